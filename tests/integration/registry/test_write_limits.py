"""Limits of changes per key and owner, of passports per owner, and of heartbeats that name no node."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.keys import rate_limits
from lucid_compute.registry.passport_quota import PassportQuota
from lucid_compute.server.settings import Settings
from lucid_compute.server.wiring import _build_write_rates
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.express_client import Entrance
from tests.other_replicas import run_sql

GPU = {"vram": "80GB", "inferenceUrl": "http://gpu:8080/v1"}


async def register(api: Api, name: str, **fields: Any) -> Any:
    """Register a passport; return the raw response."""
    return await api.http.post("/passports", json={"name": name, "type": "compute", "metadata": GPU, **fields})


def test_ten_thousand_nodes_may_register_with_one_key_at_once(settings: Settings) -> None:
    """With the default settings: each registers and declares its models."""
    rates, key = _build_write_rates(settings), Principal("key", "acme", frozenset(), None, None)
    for _ in range(20_000):
        rates.spend(key)
    for _ in range(2000):
        with suppress(RateLimited):
            rates.spend(key)
    with pytest.raises(RateLimited, match="key's limit of 20 changes a second"):
        rates.spend(key)


async def test_a_hundred_nodes_register_at_once(api: Api) -> None:
    """Where the database is too busy for all of them, some are told to come again."""
    key = await api.new_key("acme", ["compute"])
    statuses = await asyncio.gather(*(register_patiently(key, f"node-{number}", "acme") for number in range(100)))
    assert set(statuses) == {201}


async def register_patiently(api: Api, name: str, owner: str) -> int:
    """Register a node, again after each 503, whose result is unknown; return the status."""
    body = {"name": name, "type": "compute", "metadata": GPU, "owner": owner}
    while True:
        answer = await api.http.post("/passports", json=body, headers={"Idempotency-Key": name})
        if answer.status_code != 503:
            return answer.status_code


async def test_every_change_is_limited_and_nothing_that_only_reads(database_url: str) -> None:
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, writes_burst=12, key_writes_per_second=0.01)
    async with open_api(database_url, settings) as api:
        key = await api.new_key("acme", ["compute", "passports:read", "passports:write"])
        other = await api.new_key("olga", ["compute"])
        node = (await register(key, "n")).json()["id"]
        for number in range(11):
            assert (await key.http.patch(f"/passports/{node}", json={"description": str(number)})).status_code == 200
        for method, path, body in (
            ("POST", "/passports", {"name": "x", "type": "agent"}),
            ("PATCH", f"/passports/{node}", {"description": "y"}),
            ("DELETE", f"/passports/{node}", None),
            ("PUT", f"/compute/models/{node}", {"models": []}),
            ("POST", f"/compute/drain/{node}", None),
            ("POST", f"/compute/resume/{node}", None),
            ("POST", f"/compute/deregister/{node}", None),
            ("POST", "/webhooks", {"url": "https://example.com/"}),
        ):
            refused = await key.http.request(method, path, json=body)
            assert (refused.status_code, error_code(refused)) == (429, "RATE_LIMITED"), path
            assert "limit of 0.01 changes a second" in refused.json()["error"]["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 100
        assert (await key.http.get(f"/passports/{node}")).json()["description"] == "10"
        assert (await key.beat(node)).status_code == 200
        assert (await register(other, "n")).status_code == 201


async def test_an_owner_may_have_so_many_active_passports(database_url: str) -> None:
    """Of any type. One that ends makes room; a repeat of a request that made one is answered; admins count as well."""
    async with open_api(database_url, Settings(bootstrap_admin_key=ADMIN_KEY, passports_per_owner=3)) as api:
        key = await api.new_key("acme", ["compute", "passports:write"])
        first = (await register(key, "a")).json()["id"]
        await register(key, "b", type="agent", metadata={})
        made = await key.http.post(
            "/passports", json={"name": "c", "type": "compute", "metadata": GPU}, headers={"Idempotency-Key": "once"}
        )
        assert made.status_code == 201
        for asked, fields in ((key, {}), (api, {"owner": "acme"})):
            refused = await register(asked, "d", **fields)
            assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
            (fault,) = refused.json()["error"]["details"]["fields"]
            assert fault["path"] == "owner"
            assert "'acme' has 3 active passports, and 3 are allowed." in fault["message"]
        again = await key.http.post(
            "/passports", json={"name": "c", "type": "compute", "metadata": GPU}, headers={"Idempotency-Key": "once"}
        )
        assert again.json() == made.json()
        assert (await register(await api.new_key("olga", ["compute"]), "a")).status_code == 201
        await key.http.post(f"/compute/deregister/{first}")
        assert (await register(key, "d")).status_code == 201
        assert (await register(key, "e")).status_code == 422


@pytest.mark.parametrize("most", [10, 110])
async def test_registrations_at_once_do_not_exceed_the_quota(database_url: str, most: int) -> None:
    """Over two replicas; each trusts its count for a part of what is left."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, passports_per_owner=most)
    async with open_api(database_url, settings) as first, open_api(database_url, settings) as second:
        replicas = (first, second)
        statuses = await asyncio.gather(
            *(register_patiently(replicas[number % 2], f"n{number}", "acme") for number in range(most + 10))
        )
        assert sorted(statuses) == [201] * most + [422] * 10
        (count,) = (await run_sql(first, "SELECT count(*) FROM passports WHERE owner = 'acme'"))[0]
        assert count == most


async def test_few_registrations_count_the_passports_of_their_owner(api: Api) -> None:
    """Ten thousand left: a hundredth of them are registered before they are counted again."""
    counted, quota = 0, PassportQuota(10_000)

    class Counting:
        """Counts the counts."""

        async def execute(self, *_: Any) -> None: ...

        async def scalar(self, *_: Any) -> int:
            nonlocal counted
            counted += 1
            return 1

    for _ in range(99):
        await quota.check(Counting(), "acme")  # type: ignore[arg-type]
    assert counted == 1
    for number in range(20_000):
        await quota.check(Counting(), f"owner-{number}")  # type: ignore[arg-type]
    assert len(quota._rooms) <= 10_000
    await PassportQuota(0).check(Counting(), "acme")  # type: ignore[arg-type]
    assert counted == 20_001


async def test_heartbeats_of_unknown_nodes_are_limited_by_key(
    api: Api, entrance: Entrance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is looked up in the database. Of a node that has ended as well; nodes that exist are not affected."""
    monkeypatch.setattr(rate_limits, "UNKNOWN_BURST", 3)
    monkeypatch.setattr(rate_limits, "UNKNOWN_PER_SECOND", 0.001)
    key = entrance(await api.new_key("acme", ["compute"]))
    node, foreign = await key.register(), await api.register("foreign")
    for _ in range(3):
        assert (await key.beat(str(uuid4()))).status_code == 404
    refused = await key.beat(str(uuid4()))
    assert (refused.status_code, error_code(refused)) == (429, "RATE_LIMITED")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await key.beat(node)).status_code == 200
    assert (await entrance(api).beat(str(uuid4()))).status_code == 404
    assert (await entrance(api).beat(foreign)).status_code == 200
