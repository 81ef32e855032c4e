"""Keys: shown once, kept as hashes, rotated, revoked, expired, bound to a node, and set from outside."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lucid_compute.postgres.database import connect
from lucid_compute.server.preparation import prepare
from tests.api import ADMIN_KEY, Api, error_code
from tests.other_replicas import run_sql, until

FIELDS = [
    "id",
    "key",
    "name",
    "owner",
    "scopes",
    "prefix",
    "lastFour",
    "passportId",
    "expiresAt",
    "limits",
    "createdAt",
    "rotatedAt",
    "lastUsedAt",
]


async def make(api: Api, **fields: Any) -> Any:
    """Ask for a key of acme; return the raw response."""
    return await api.http.post("/keys", json={"name": "k", "owner": "acme", "scopes": ["compute"], **fields})


async def status_with(api: Api, key: str) -> int:
    """Return the status of a read with this key."""
    return (await api.with_key(key).http.get("/compute")).status_code


def first_fault(answer: Any) -> Any:
    """The place that an INVALID_REQUEST names first."""
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST"), answer.text
    return answer.json()["error"]["details"]["fields"][0]["path"]


@pytest.mark.parametrize("scope", ["compute", "inference:run", "admin"])
async def test_each_key_may_read_itself(api: Api, scope: str) -> None:
    """Whatever its scopes; never its secret."""
    limits = {"requestsPerMinute": 30, "budgetUsd": "20", "budgetPeriod": "month"}
    made = (await make(api, name="mine", scopes=[scope], limits=limits)).json()
    answer = await api.with_key(made["key"]).http.get("/me")
    assert (answer.json()["id"], answer.json()["name"], answer.json()["owner"]) == (made["id"], "mine", "acme")
    assert answer.json()["limits"] == made["limits"]
    assert made["key"] not in answer.text


async def test_a_key_is_shown_once(api: Api) -> None:
    made = (await make(api, scopes=["compute", "passports:read"])).json()
    assert sorted(made) == sorted(FIELDS)
    assert made["key"].startswith(f"lk_live_{made['id']}_")
    assert made["key"].startswith(made["prefix"])
    assert made["key"].endswith(made["lastFour"])
    assert (made["owner"], sorted(made["scopes"])) == ("acme", ["compute", "passports:read"])
    assert (made["limits"], made["expiresAt"], made["passportId"]) == (None, None, None)
    listed = await api.http.get("/keys")
    assert made["key"] not in listed.text
    (found,) = [key for key in listed.json()["keys"] if key["id"] == made["id"]]
    assert found == {key: value for key, value in made.items() if key != "key"}


async def test_nothing_secret_of_a_key_is_in_the_database(api: Api) -> None:
    first = (await make(api)).json()
    second = (await api.http.post(f"/keys/{first['id']}/rotate")).json()["key"]
    secrets = [key.removeprefix(f"lk_live_{first['id']}_") for key in (first["key"], second)]
    tables = await run_sql(api, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    dump = "\n".join(
        [row[0] for (table,) in tables for row in await run_sql(api, f"SELECT to_jsonb(t)::text FROM {table} t")]
    )
    assert first["id"] in dump
    for secret in (*secrets, ADMIN_KEY):
        assert secret not in dump
        assert secret[:32] not in dump
        assert secret.encode().hex() not in dump


async def test_a_key_that_cannot_be_is_refused(api: Api) -> None:
    past = "2020-01-01T00:00:00Z"
    for fields, path in (
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"scopes": "admin"}, "scopes"),
        ({"owner": ""}, "owner"),
        ({"expiresAt": past}, "expiresAt"),
        ({"expiresAt": "tomorrow"}, "expiresAt"),
        ({"limits": {"requestsPerMinute": 0}}, "limits.requestsPerMinute"),
        ({"limits": {"concurrency": 0}}, "limits.concurrency"),
        ({"limits": {"budgetUsd": "5"}}, "limits"),
        ({"limits": {"budgetPeriod": "day"}}, "limits"),
        ({"limits": {"budgetUsd": 0, "budgetPeriod": "day"}}, "limits"),
        ({"limits": {"budgetUsd": -1, "budgetPeriod": "day"}}, "limits.budgetUsd"),
        ({"limits": {"budgetUsd": 1, "budgetPeriod": "year"}}, "limits.budgetPeriod"),
        ({"limits": {"models": []}}, "limits.models"),
        ({"limits": {"models": ["m"] * 101}}, "limits.models"),
        ({"limits": {"models": ["m\n"]}}, "limits.models.0"),
        ({"key": "lk_live_mine"}, "key"),
        ({"passportId": "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11"}, "passportId"),
    ):
        assert first_fault(await make(api, **fields)) == path, fields


async def test_no_key_and_a_wrong_key_are_unauthorized_alike(api: Api) -> None:
    right = (await make(api)).json()["key"]
    wrong = right[:30] + ("a" if right[30] != "a" else "b") + right[31:]

    async def answered(header: str) -> Any:
        headers = [(b"authorization", header.encode())]
        return await api.with_key(None).http.get("/compute", headers=headers)

    guesses = (f"Bearer {wrong}", "Bearer lk_live_nothing", "Bearer " + "x" * 3000, "Bearer ключ")
    answers = [await answered(header) for header in guesses]
    for header in ("Basic YTpi", "Bearer", ""):
        answer = await answered(header)
        assert (answer.status_code, error_code(answer)) == (401, "UNAUTHORIZED")
    assert {answer.text for answer in answers} == {answers[0].text}
    assert {(a.status_code, error_code(a)) for a in answers} == {(401, "UNAUTHORIZED")}
    assert answers[0].headers["www-authenticate"].startswith("Bearer")
    assert (await answered(f"bearer {right}")).status_code == 200


async def test_a_rotated_keys_former_secret_stays_valid_for_24_hours(api: Api) -> None:
    first = (await make(api)).json()
    rotated = await api.http.post(f"/keys/{first['id']}/rotate")
    assert rotated.status_code == 200
    second = rotated.json()
    assert second["id"] == first["id"]
    assert second["key"] != first["key"]
    assert [await status_with(api, key) for key in (first["key"], second["key"])] == [200, 200]
    overlap = await run_sql(api, "SELECT former_valid_until - rotated_at FROM api_keys WHERE id = $1", first["id"])
    assert overlap[0][0] == timedelta(hours=24)
    await change_row(api, first["id"], "former_valid_until = now() - interval '1 second'")
    await until_status(api, first["key"], 401)
    assert await status_with(api, second["key"]) == 200


async def test_rotating_now_ends_the_former_secret_at_once(api: Api) -> None:
    first = (await make(api)).json()
    second = (await api.http.post(f"/keys/{first['id']}/rotate", json={"now": True})).json()
    assert [await status_with(api, key) for key in (first["key"], second["key"])] == [401, 200]
    third = (await api.http.post(f"/keys/{first['id']}/rotate", json={"now": False})).json()
    assert [await status_with(api, key) for key in (second["key"], third["key"])] == [200, 200]


async def test_a_revoked_key_is_unauthorized_at_once_with_its_former_secret(api: Api) -> None:
    first = (await make(api)).json()
    second = (await api.http.post(f"/keys/{first['id']}/rotate")).json()
    revoked = await api.http.delete(f"/keys/{first['id']}")
    assert (revoked.status_code, revoked.content) == (204, b"")
    assert [await status_with(api, key) for key in (first["key"], second["key"])] == [401, 401]
    beat = await api.with_key(second["key"]).beat("7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11")
    assert beat.status_code == 401
    assert first["id"] not in (await api.http.get("/keys")).text
    for again in (await api.http.delete(f"/keys/{first['id']}"), await api.http.post(f"/keys/{first['id']}/rotate")):
        assert (again.status_code, error_code(again)) == (404, "KEY_NOT_FOUND")


async def test_an_expired_key_is_unauthorized(api: Api) -> None:
    made = (await make(api, expiresAt=(datetime.now(UTC) + timedelta(days=1)).isoformat())).json()
    assert await status_with(api, made["key"]) == 200
    await change_row(api, made["id"], "expires_at = now() - interval '1 second'")
    await until_status(api, made["key"], 401)


async def test_an_unknown_key_is_not_found(api: Api) -> None:
    for key_id in ("nothing", "x%00y", "%00", "a'b"):
        for answer in (await api.http.delete(f"/keys/{key_id}"), await api.http.post(f"/keys/{key_id}/rotate")):
            assert (answer.status_code, error_code(answer)) == (404, "KEY_NOT_FOUND"), key_id


async def change(api: Api, key_id: str, **fields: Any) -> Any:
    """Change a key; return the raw response."""
    return await api.http.patch(f"/keys/{key_id}", json=fields)


async def test_a_key_is_changed_without_another_secret(api: Api) -> None:
    """What is left out stays, null removes, also inside the limits; the answer has no secret."""
    made = (await make(api, limits={"requestsPerMinute": 60, "concurrency": 4})).json()
    until = "2031-01-31T12:00:00.000Z"
    changed = (await change(api, made["id"], name="renamed", expiresAt=until, limits={"concurrency": None})).json()
    assert changed == {
        **{name: value for name, value in made.items() if name != "key"},
        "name": "renamed",
        "expiresAt": until,
        "limits": {**made["limits"], "concurrency": None},
    }
    assert await status_with(api, made["key"]) == 200
    budget = {"budgetUsd": "2.50", "budgetPeriod": "day"}
    assert (await change(api, made["id"], limits=budget)).json()["limits"] == {
        **made["limits"],
        "concurrency": None,
        **budget,
    }
    assert (await change(api, made["id"], limits={"budgetUsd": "3"})).json()["limits"]["budgetPeriod"] == "day"
    bare = (await change(api, made["id"], limits=None, expiresAt=None)).json()
    assert (bare["limits"], bare["expiresAt"], bare["name"]) == (None, None, "renamed")
    assert (await change(api, made["id"])).json() == bare
    assert (await change(api, made["id"], limits={"models": None})).json()["limits"] is None
    listed = (await api.http.get("/keys?owner=acme")).json()["keys"]
    assert [key for key in listed if key["id"] == made["id"]] == [bare]


async def test_a_change_that_cannot_be_is_refused_and_changes_nothing(api: Api) -> None:
    made = (await make(api, limits={"requestsPerMinute": 60})).json()
    for fields, path in (
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"expiresAt": "2020-01-31T12:00:00Z"}, "expiresAt"),
        ({"expiresAt": "tomorrow"}, "expiresAt"),
        ({"limits": {"requestsPerMinute": 0}}, "limits.requestsPerMinute"),
        ({"limits": {"budgetUsd": "2"}}, "limits"),
        ({"limits": {"budgetUsd": 0, "budgetPeriod": "day"}}, "limits"),
        ({"limits": {"models": []}}, "limits.models"),
        ({"limits": {"unknown": 1}}, "limits.unknown"),
        ({"limits": 5}, "limits"),
        ({"scopes": ["admin"]}, "scopes"),
        ({"owner": "rival"}, "owner"),
    ):
        assert first_fault(await change(api, made["id"], **{"name": "other", **fields})) == path, fields
    (found,) = (await api.http.get("/keys?owner=acme")).json()["keys"]
    assert (found["name"], found["limits"]) == ("k", made["limits"])
    (bootstrap,) = (await api.http.get("/keys?owner=admin")).json()["keys"]
    assert first_fault(await change(api, bootstrap["id"], expiresAt=None)) == "keyId"
    await api.http.delete(f"/keys/{made['id']}")
    for key_id in (made["id"], "unknown", "%00", "a" * 300):
        assert error_code(await change(api, key_id, name="other")) == "KEY_NOT_FOUND"


async def test_an_expiry_is_changed_in_time_and_afterwards(api: Api) -> None:
    """A key that has expired is valid again when its expiry moves; each change is an audit row with its fields."""
    made = (await make(api)).json()
    soon = (api.replica.clock.now() + timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    assert (await change(api, made["id"], expiresAt=soon)).status_code == 200
    await until_status(api, made["key"], 401)
    assert (await change(api, made["id"], expiresAt=None, name="longer")).status_code == 200
    assert await status_with(api, made["key"]) == 200
    rows = (await api.http.get("/audit", params={"targetId": made["id"]})).json()["events"]
    assert [row["action"] for row in rows] == ["key.change", "key.change", "key.create"]
    assert [row["details"] for row in rows[:2]] == [{"fields": ["expiresAt", "name"]}, {"fields": ["expiresAt"]}]
    assert rows[0]["beforeHash"] == rows[1]["afterHash"] != rows[0]["afterHash"]


async def test_a_bound_key_changes_its_one_node_and_no_other(api: Api) -> None:
    whole = await api.new_key("acme", ["compute"])
    mine, other = await whole.register("mine"), await whole.register("other")
    foreign = await api.register()
    bound = await api.new_key("acme", ["compute"], passportId=mine)
    assert (await bound.beat(mine)).status_code == 200
    assert (await bound.http.put(f"/compute/models/{mine}", json={"models": []})).status_code == 200
    assert (await bound.http.patch(f"/passports/{mine}", json={"description": "x"})).status_code == 200
    for node, status in ((other, 403), (foreign, 404), ("7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11", 404)):
        refused = [
            await bound.beat(node),
            await bound.http.put(f"/compute/models/{node}", json={"models": []}),
            *[await bound.http.post(f"/compute/{call}/{node}") for call in ("drain", "resume", "deregister")],
            await bound.http.patch(f"/passports/{node}", json={"description": "x"}),
            await bound.http.delete(f"/passports/{node}"),
        ]
        assert [answer.status_code for answer in refused] == [status] * 7, node
    new = {"name": "new", "type": "compute", "metadata": {"vram": 8, "inferenceUrl": "http://gpu"}}
    assert error_code(await bound.http.post("/passports", json=new)) == "FORBIDDEN"


async def test_only_a_compute_key_of_the_nodes_owner_can_be_bound(api: Api) -> None:
    node = await api.register()
    agent = (await api.http.post("/passports", json={"name": "a", "type": "agent", "owner": "acme"})).json()["id"]
    assert first_fault(await make(api, passportId=node)) == "passportId"
    assert first_fault(await make(api, passportId=agent)) == "passportId"
    assert first_fault(await make(api, owner="admin", scopes=["admin"], passportId=node)) == "passportId"
    assert (await make(api, owner="admin", passportId=node)).json()["passportId"] == node


async def test_a_key_may_have_every_limit_of_the_contract(api: Api) -> None:
    """Money stays exact; what is not set is not stored, so that an older replica can read the key."""
    limits = {"concurrency": 4, "budgetUsd": 12.5, "budgetPeriod": "month", "models": ["llama-*", "m/7b"]}
    made = (await make(api, limits=limits)).json()
    shown = {**limits, "budgetUsd": "12.5", "requestsPerMinute": None, "tokensPerMinute": None}
    assert made["limits"] == shown
    (listed,) = [key for key in (await api.http.get("/keys?owner=acme")).json()["keys"] if key["id"] == made["id"]]
    assert listed["limits"] == shown
    connection = await connect(api.replica.database.url)
    stored = await connection.fetchval("SELECT limits FROM api_keys WHERE id = $1", made["id"])
    await connection.close()
    assert json.loads(stored) == {**limits, "budgetUsd": "12.5"}
    assert (await api.http.post(f"/keys/{made['id']}/rotate")).json()["limits"] == shown


async def test_x_api_key_names_a_key_below_v1_only(api: Api) -> None:
    """As clients of Anthropic's protocol send it; an Authorization header goes before it."""
    key = (await make(api, scopes=["inference:run"])).json()["key"]
    api.http.headers.pop("authorization")
    body, named = {"model": "none", "messages": []}, {"x-api-key": key}
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        assert (await api.http.post(path, json=body, headers=named)).status_code == 404, path
        assert (await api.http.post(path, json=body, headers={"x-api-key": "wrong"})).status_code == 401
        assert (await api.http.post(path, json=body)).status_code == 401
        both = {**named, "authorization": "Bearer wrong"}
        assert (await api.http.post(path, json=body, headers=both)).status_code == 401
    twice = [("x-api-key", key), ("x-api-key", key)]
    assert (await api.http.post("/v1/embeddings", json=body, headers=twice)).status_code == 401
    assert (await api.http.get("/v1/models", headers=named)).status_code == 200
    assert (await api.http.get("/v1/models", headers={"x-api-key": "wrong"})).status_code == 401
    assert (await api.http.get("/models", headers={"x-api-key": "wrong"})).status_code == 200
    assert (await api.http.post("/match", json={"model": "none"}, headers=named)).status_code == 401
    assert (await api.http.get("/usage", headers=named)).status_code == 401


async def test_a_keys_limits_are_kept(api: Api) -> None:
    made = (await make(api, limits={"requestsPerMinute": 60})).json()
    unset = dict.fromkeys(("tokensPerMinute", "concurrency", "budgetUsd", "budgetPeriod", "models"))
    assert made["limits"] == {"requestsPerMinute": 60, **unset}


async def test_changing_the_bootstrap_key_revokes_the_former_and_changing_it_back_restores_it(api: Api) -> None:
    other = "another admin key, any form ✓"
    for new, former in ((other, ADMIN_KEY), (ADMIN_KEY, other), (other, ADMIN_KEY)):
        url = api.replica.database.url
        await prepare(url, data_dir=Path("/nonexistent"), bootstrap_admin_key=new)
        await until_status(api, former, 401)
        await until_status(api, new, 200)
    live = "SELECT count(*) FROM api_keys WHERE is_bootstrap AND revoked_at IS NULL"
    assert (await run_sql(api, live))[0][0] == 1


async def test_the_bootstrap_key_is_changed_from_outside_only(api: Api) -> None:
    (bootstrap,) = (await api.http.get("/keys")).json()["keys"]
    assert ADMIN_KEY not in str(bootstrap)
    assert first_fault(await api.http.post(f"/keys/{bootstrap['id']}/rotate")) == "keyId"


async def change_row(api: Api, key_id: str, change: str) -> None:
    """Change a key as another replica would."""
    await run_sql(
        api,
        f"UPDATE api_keys SET {change}, revision = revision + 1, changed_xid = pg_current_xact_id() WHERE id = $1",
        key_id,
    )


async def until_status(api: Api, key: str, status: int) -> None:
    """Wait until a read with this key has this status, two seconds at most."""

    async def is_so() -> bool:
        headers = [(b"authorization", b"Bearer " + key.encode())]
        return (await api.with_key(None).http.get("/compute", headers=headers)).status_code == status

    await until(is_so, deadline_seconds=2)


async def test_the_time_of_last_use_is_stored_for_any_number_of_keys(api: Api) -> None:
    """More than a statement has parameters: providers are advised to give each node a key of its own."""
    made = (await make(api)).json()["id"]
    ring = api.replica.keys
    ring.used_ids = {made, *(f"key-{number}" for number in range(40_000))}
    await api.replica.key_store.record_used()
    assert not ring.used_ids
    assert (await run_sql(api, "SELECT last_used_at FROM api_keys WHERE id = $1", made))[0][0] is not None


async def test_a_time_of_last_use_that_could_not_be_stored_is_stored_later(api: Api) -> None:
    """The ids used meanwhile as well."""
    made = (await make(api)).json()["id"]
    ring, connection = api.replica.keys, await connect(api.replica.database.url)
    ring.used_ids = {made}
    async with connection.transaction():
        await connection.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        storing = asyncio.create_task(api.replica.key_store.record_used())
        await asyncio.sleep(0)
        ring.used_ids.add("another")
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
    await connection.close()
    assert ring.used_ids >= {made, "another"}
    await api.replica.key_store.record_used()
    assert (await run_sql(api, "SELECT last_used_at FROM api_keys WHERE id = $1", made))[0][0] is not None
