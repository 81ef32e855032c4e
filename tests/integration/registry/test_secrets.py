"""Secrets of nodes and upstreams: every replica has the newest ones soon, and none is ever shown."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api
from tests.other_replicas import run_sql, until

WITHIN_SECONDS = 2.0 * 3
FIRST, SECOND = "node-key-one", "node-key-two"


@asynccontextmanager
async def another_replica(database_url: str, *, listens: bool) -> AsyncIterator[Api]:
    """A second replica on the database; one that does not listen learns of everything by its poll."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, feed_follows_notifications=listens)
    async with open_api(database_url, settings) as replica:
        yield replica


def held(replica: Api, passport_id: str) -> Mapping[str, Any]:
    """Return the credentials that the replica uses for the node or the upstream."""
    return replica.replica.fleet.secrets.of(passport_id)


async def until_held(replica: Api, passport_id: str, expected: Mapping[str, Any]) -> None:
    """Wait until the replica holds exactly these secrets; the contract's two seconds, with threefold slack."""

    async def is_held() -> bool:
        return held(replica, passport_id) == expected

    await until(is_held, WITHIN_SECONDS)


async def patch(api: Api, passport_id: str, metadata: dict[str, Any]) -> None:
    """Patch a passport's metadata."""
    answer = await api.http.patch(f"/passports/{passport_id}", json={"metadata": metadata})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("listens", [True, False], ids=["notified", "by the poll"])
async def test_every_replica_holds_a_nodes_key_its_rotation_and_its_removal(
    api: Api, database_url: str, *, listens: bool
) -> None:
    """The replica that made the change has it at once, the other one within two seconds."""
    before = await api.register("before", {"inferenceKey": FIRST})
    async with another_replica(database_url, listens=listens) as other:
        assert held(other, before) == {"inferenceKey": FIRST}
        node = await api.register("during", {"inferenceKey": FIRST})
        for metadata, expected in (
            ({}, {"inferenceKey": FIRST}),
            ({"inferenceKey": SECOND}, {"inferenceKey": SECOND}),
            ({"inferenceKey": None}, {}),
            ({"inferenceKey": FIRST}, {"inferenceKey": FIRST}),
        ):
            await patch(api, node, metadata)
            assert held(api, node) == expected
            await until_held(other, node, expected)


async def test_every_replica_holds_a_models_upstream_key(api: Api, database_url: str) -> None:
    """Set by one replica, rotated by the other."""
    upstream = {"url": "https://1.1.1.1/v1", "model": "m", "apiKey": FIRST}
    async with another_replica(database_url, listens=True) as other:
        model = await api.add_model("api-model", "api", upstream=upstream)
        await until_held(other, model, {"upstreamApiKey": FIRST})
        await patch(other, model, {"upstream": {"apiKey": SECOND}})
        await until_held(api, model, {"upstreamApiKey": SECOND})
        await patch(other, model, {"upstream": None})
        await until_held(api, model, {})


@pytest.mark.parametrize("call", ["deregister", "delete", "patch"])
async def test_what_ended_has_no_secrets_on_any_replica(api: Api, database_url: str, call: str) -> None:
    """A node or a model that has ended gets no more requests."""
    async with another_replica(database_url, listens=True) as other:
        upstream = {"url": "https://1.1.1.1/v1", "model": "m", "apiKey": FIRST}
        node = await api.register(metadata={"inferenceKey": FIRST})
        model = await api.add_model("api-model", "api", upstream=upstream)
        await until_held(other, node, {"inferenceKey": FIRST})
        await until_held(other, model, {"upstreamApiKey": FIRST})
        for passport_id in (node, model):
            if call == "patch":
                answer = await api.http.patch(f"/passports/{passport_id}", json={"status": "revoked"})
            elif call == "deregister" and passport_id == node:
                answer = await api.http.post(f"/compute/deregister/{node}")
            else:
                answer = await api.http.delete(f"/passports/{passport_id}")
            assert answer.is_success, answer.text
            assert held(api, passport_id) == {}
            await until_held(other, passport_id, {})
    async with another_replica(database_url, listens=True) as later:
        assert (held(later, node), held(later, model)) == ({}, {})


async def test_a_key_that_was_removed_while_nobody_followed_is_forgotten(api: Api) -> None:
    """The feed lost its connection; the load that follows does not bring the key, and it is gone."""
    node = await api.register(metadata={"inferenceKey": FIRST})
    await run_sql(
        api,
        """WITH cut AS (SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                        WHERE application_name = 'lucid feed' AND datname = current_database())
           UPDATE passports SET secrets = '{}', revision = revision + 1, changed_xid = pg_current_xact_id()
           FROM cut WHERE id = $1""",
        node,
    )
    await until_held(api, node, {})


async def test_no_answer_no_record_and_no_line_of_the_log_shows_a_secret(
    api: Api, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a row that can't be read, which is logged by its id and the fault alone."""
    caplog.set_level("DEBUG")
    async with another_replica(database_url, listens=True) as other:
        kept = await api.register("kept", {"inferenceKey": FIRST})
        node = await api.register(metadata={"inferenceKey": FIRST})
        await until_held(other, node, {"inferenceKey": FIRST})
        assert held(other, kept) == {"inferenceKey": FIRST}
        odd = "UPDATE passports SET secrets = $2::jsonb, revision = 9, changed_xid = pg_current_xact_id() WHERE id = $1"
        await run_sql(api, odd, node, f'"{SECOND}"')
        await until_held(other, node, {})
        fleet = other.replica.fleet
        paths = ("/passports", f"/passports/{node}", "/compute", f"/compute/health/{node}", "/audit", "/metrics")
        shown = [(await other.http.get(path)).text for path in paths]
        shown += [caplog.text, repr(fleet.secrets), repr(fleet.get_node(node, owner=None).record)]
    assert "a secrets could not be read and is left out" in caplog.text
    assert not any(secret in text for text in shown for secret in (FIRST, SECOND))
