"""Idempotency-Key on POST /passports: one row, however often the request is sent."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.api import Api, error_code
from tests.other_replicas import run_sql

AGENT = {"name": "x", "type": "agent"}


async def make(api: Api, key: str | None, **changes: Any) -> Any:
    """Ask for an agent with an Idempotency-Key; return the raw response."""
    headers = {"Idempotency-Key": key} if key is not None else {}
    return await api.http.post("/passports", json={**AGENT, **changes}, headers=headers)


async def count(api: Api) -> int:
    """Return how many passports there are."""
    return int((await run_sql(api, "SELECT count(*) FROM passports"))[0][0])


async def test_the_same_request_again_is_answered_with_the_same_passport(api: Api) -> None:
    first, second = await make(api, "k"), await make(api, "k")
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert second.headers["location"] == first.headers["location"]
    assert await count(api) == 1
    trail = (await api.http.get("/audit", params={"targetId": first.json()["id"]})).json()
    assert trail["pagination"]["total"] == 1


async def test_fifty_at_once_make_one_row(api: Api) -> None:
    node = {"name": "gpu", "type": "compute", "metadata": {"vram": 80, "inferenceUrl": "http://gpu"}}
    answers = await asyncio.gather(*[make(api, "k", **node) for _ in range(50)])
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await count(api) == 1
    assert (await run_sql(api, "SELECT count(*) FROM nodes"))[0][0] == 1


async def test_fifty_at_once_without_a_key_make_one_row_and_49_conflicts(api: Api) -> None:
    answers = await asyncio.gather(*[make(api, None) for _ in range(50)])
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    (made,) = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    conflicts = [answer.json()["error"] for answer in answers if answer.status_code == 409]
    assert {error["code"] for error in conflicts} == {"PASSPORT_EXISTS"}
    assert {error["details"]["passportId"] for error in conflicts} == {made}


async def test_another_body_is_a_conflict_and_another_key_is_another_request(api: Api) -> None:
    await make(api, "k")
    other = await make(api, "k", description="other")
    assert (other.status_code, error_code(other)) == (409, "IDEMPOTENCY_CONFLICT")
    assert error_code(await make(api, "l")) == "PASSPORT_EXISTS"
    assert (await make(api, "l", name="y")).status_code == 201
    assert await count(api) == 2


async def test_a_refused_request_leaves_its_key_free(api: Api) -> None:
    await make(api, None)
    assert error_code(await make(api, "k")) == "PASSPORT_EXISTS"
    assert error_code(await make(api, "k", type="nonsense")) == "INVALID_REQUEST"
    assert (await make(api, "k", name="y")).status_code == 201


async def test_each_owner_has_keys_of_its_own(api: Api) -> None:
    made = set()
    for owner in ("acme", "rival"):
        writer = await api.new_key(owner, ["passports:write"])
        answer = await make(writer, "k")
        assert answer.json()["owner"] == owner
        made.add(answer.json()["id"])
    assert len(made) == 2


async def test_a_key_that_cannot_be_is_refused(api: Api) -> None:
    for key in ("", "x" * 256, "a b", "ключ".encode().decode("latin-1")):
        refused = await api.http.post("/passports", json=AGENT, headers={b"idempotency-key": key.encode("latin-1")})
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST"), key
        assert refused.json()["error"]["details"]["fields"][0]["path"].lower() == "header.idempotency-key"
    assert await count(api) == 0
