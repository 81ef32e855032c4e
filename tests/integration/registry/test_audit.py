"""The audit trail: one row for each change, in its transaction, that nothing can change."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from lucid_compute.postgres.queries import COUNTED
from tests.api import Api
from tests.other_replicas import run_sql

FIELDS = [
    "id",
    "at",
    "actorKeyId",
    "actorOwner",
    "action",
    "targetType",
    "targetId",
    "beforeHash",
    "afterHash",
    "ip",
    "requestId",
    "details",
]


async def trail(api: Api, **query: Any) -> list[dict[str, Any]]:
    """Return the trail, oldest first."""
    answer = await api.http.get("/audit", params={"perPage": 100, **query})
    assert answer.status_code == 200, answer.text
    return list(reversed(answer.json()["events"]))


async def test_every_change_of_a_node_writes_one_row_that_says_who_what_when_and_from_where(api: Api) -> None:
    acme = await api.new_key("acme", ["compute", "passports:read"])
    node = await acme.register()
    await acme.http.patch(f"/passports/{node}", json={"description": "x"}, headers={"X-Request-Id": "my-request"})
    await acme.http.put(f"/compute/models/{node}", json={"models": [{"id": "m"}]})
    for call in ("drain", "drain", "resume", "resume", "deregister", "deregister"):
        await acme.http.post(f"/compute/{call}/{node}")
    await acme.http.delete(f"/passports/{node}")
    rows = await trail(api, targetId=node)
    assert [row["action"] for row in rows] == [
        "passport.create",
        "passport.change",
        "compute.declare",
        "compute.drain",
        "compute.resume",
        "compute.drain",
        "compute.deregister",
        "passport.revoke",
    ]
    key_id = acme.key.split("_")[2] if acme.key else ""
    for row in rows:
        assert sorted(row) == sorted(FIELDS)
        assert (row["actorKeyId"], row["actorOwner"], row["ip"]) == (key_id, "acme", "127.0.0.1")
        assert (row["targetType"], row["targetId"]) == ("compute", node)
        assert row["requestId"]
    assert rows[1]["requestId"] == "my-request"
    assert [row["details"] for row in rows if row["action"] == "compute.drain"] == [{}, {"reason": "deregistering"}]
    assert rows[1]["beforeHash"] == rows[0]["afterHash"]
    assert rows[1]["afterHash"] != rows[1]["beforeHash"]


async def test_every_change_of_a_key_writes_one_row(api: Api) -> None:
    made = (await api.http.post("/keys", json={"name": "k", "owner": "acme", "scopes": ["compute"]})).json()
    await api.http.post(f"/keys/{made['id']}/rotate")
    await api.http.post(f"/keys/{made['id']}/rotate", json={"now": True})
    await api.http.delete(f"/keys/{made['id']}")
    rows = await trail(api, targetId=made["id"])
    assert [row["action"] for row in rows] == ["key.create", "key.rotate", "key.rotate", "key.revoke"]
    assert rows[0]["details"] == {"owner": "acme", "scopes": ["compute"]}
    assert made["key"] not in str(await trail(api))


async def test_what_is_refused_and_what_only_reads_leaves_no_trace(api: Api) -> None:
    node = await api.register()
    before = await trail(api)
    for method, path, body in (
        ("POST", "/passports", {"name": "my-gpu-node", "type": "compute", "metadata": {}}),
        ("PATCH", f"/passports/{node}", {"type": "model"}),
        ("PUT", f"/compute/models/{node}", {"models": [{"id": "m"}, {"id": "m"}]}),
        ("POST", "/keys", {"name": "k", "owner": "acme", "scopes": []}),
        ("DELETE", "/keys/unknown", None),
        ("GET", f"/passports/{node}", None),
        ("GET", f"/compute/health/{node}", None),
    ):
        await api.http.request(method, path, json=body)
    await api.beat(node)
    assert await trail(api) == before


async def test_a_change_and_its_row_are_one_transaction(api: Api) -> None:
    """Where the row can't be written, nothing is changed."""
    node = await api.register()
    await run_sql(api, "ALTER TABLE audit_log ADD CONSTRAINT none_more CHECK (action = 'none') NOT VALID")
    for method, path, body in (
        ("PATCH", f"/passports/{node}", {"description": "x"}),
        ("POST", f"/compute/drain/{node}", None),
        ("POST", f"/compute/deregister/{node}", None),
        ("DELETE", f"/passports/{node}", None),
    ):
        with pytest.raises(Exception, match="none_more"):
            await api.http.request(method, path, json=body)
    await run_sql(api, "ALTER TABLE audit_log DROP CONSTRAINT none_more")
    passport = (await api.http.get(f"/passports/{node}")).json()
    assert (passport["description"], passport["status"]) == (None, "active")
    assert (await api.health(node))["status"] == "unhealthy"


async def test_nothing_can_change_the_trail(api: Api) -> None:
    await api.register()
    for statement in ("UPDATE audit_log SET action = 'x'", "DELETE FROM audit_log", "TRUNCATE audit_log"):
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await run_sql(api, statement)
    assert "passport.create" in {row["action"] for row in await trail(api)}


async def test_the_bootstrap_key_is_in_the_trail(api: Api) -> None:
    (row,) = await trail(api)
    assert (row["action"], row["actorKeyId"], row["ip"]) == ("key.bootstrap", None, None)


async def test_the_trail_is_selected_by_action_actor_and_time(api: Api) -> None:
    """An action may be a group of them, an actor an owner or a key; a group is no prefix of a word."""
    acme = await api.new_key("acme", ["compute", "passports:read"])
    node = await acme.register()
    for call in ("drain", "resume"):
        await acme.http.post(f"/compute/{call}/{node}")
    await run_sql(api, "INSERT INTO audit_log (action, target_type, target_id) VALUES ('computed', 'y', 'z')")
    drain, resume = await trail(api, action="compute")
    assert [drain["action"], resume["action"]] == ["compute.drain", "compute.resume"]
    assert [row["id"] for row in await trail(api, action="compute.drain")] == [drain["id"]]
    assert await trail(api, action="compute%") == []
    assert [row["action"] for row in await trail(api, actor="acme")] == [
        "passport.create",
        "compute.drain",
        "compute.resume",
    ]
    assert await trail(api, actor=drain["actorKeyId"]) == await trail(api, actor="acme")
    assert [row["id"] for row in await trail(api, action="compute", since=resume["at"])] == [resume["id"]]
    assert [row["id"] for row in await trail(api, action="compute", until=resume["at"])] == [drain["id"]]
    answer = await api.http.get("/audit", params={"action": "compute", "perPage": 1})
    assert answer.json()["pagination"]["total"] == 2


async def test_a_trail_of_any_length_is_listed(api: Api) -> None:
    """Its rows are counted up to a bound: to count millions takes longer than a request may."""
    many = "INSERT INTO audit_log (action, target_type, target_id) SELECT 'x', 'y', 'many' FROM generate_series(1, $1)"
    await run_sql(api, many, COUNTED + 50)
    for page, shown, total in ((1, 100, COUNTED), (1000, 100, COUNTED + 1), (1001, 50, COUNTED + 50)):
        answer = await api.http.get("/audit", params={"targetId": "many", "perPage": 100, "page": page})
        assert len(answer.json()["events"]) == shown
        assert answer.json()["pagination"]["total"] == total
    assert (await api.http.get("/audit")).json()["pagination"]["total"] == COUNTED
