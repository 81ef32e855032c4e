"""Every code of the error table that the registry answers, each in the one shape and with its status."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from lucid_compute.postgres.database import connect
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api

NODE = {"name": "gpu", "type": "compute", "metadata": {"vram": 80, "inferenceUrl": "http://gpu"}}
MODEL = {"name": "m", "type": "model", "metadata": {"format": "gguf"}}


def error_of(answer: httpx.Response, status: int, code: str) -> Any:
    """The error of a refusal, which has exactly the contract's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert sorted(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert sorted(error) == ["code", "details", "message", "status"]
    assert (error["code"], error["status"]) == (code, status)
    assert len(error["message"].split()) > 3
    assert isinstance(error["details"], dict)
    return error


async def test_a_request_that_cannot_be_understood(api: Api) -> None:
    answer = await api.http.post("/passports", json={"type": "robot", "surprise": 1})
    error = error_of(answer, 422, "INVALID_REQUEST")
    fields = error["details"]["fields"]
    assert {field["path"] for field in fields} == {"name", "type", "surprise"}
    assert all(sorted(field) == ["message", "path"] and field["message"] for field in fields)
    for route in ("/passports", "/compute/heartbeat", "/keys"):
        error_of(await api.http.post(route, content=b"{not json"), 400, "INVALID_REQUEST")


async def test_who_is_not_known_or_may_not(api: Api) -> None:
    for route in ("/compute", "/compute/heartbeat"):
        method = "POST" if route.endswith("heartbeat") else "GET"
        error_of(await api.with_key(None).http.request(method, route), 401, "UNAUTHORIZED")
    reader = await api.new_key("acme", ["passports:read"])
    for method, route, body in (
        ("GET", "/keys", None),
        ("POST", "/passports", NODE),
        ("POST", "/compute/heartbeat", {}),
    ):
        error_of(await reader.http.request(method, route, json=body), 403, "FORBIDDEN")


async def test_what_is_not_there(api: Api) -> None:
    for path, code in (
        ("/passports/x", "PASSPORT_NOT_FOUND"),
        ("/compute/health/x", "NODE_NOT_FOUND"),
        ("/compute/models/x", "NODE_NOT_FOUND"),
        ("/compute/events/x", "NODE_NOT_FOUND"),
        ("/models/x", "MODEL_NOT_FOUND"),
        ("/models/x/availability", "MODEL_NOT_FOUND"),
        ("/nowhere", "ROUTE_NOT_FOUND"),
        ("/compute/nowhere", "ROUTE_NOT_FOUND"),
        ("/passports/", "ROUTE_NOT_FOUND"),
        ("/%00", "ROUTE_NOT_FOUND"),
    ):
        error_of(await api.http.get(path), 404, code)
    error_of(await api.http.delete("/keys/x"), 404, "KEY_NOT_FOUND")


async def test_a_method_that_a_path_does_not_take(api: Api) -> None:
    for method, path in (
        ("PUT", "/passports"),
        ("POST", "/compute"),
        ("GET", "/compute/drain/x"),
        ("POST", "/models"),
        ("DELETE", "/keys"),
        ("PATCH", "/healthz"),
        ("GET", "/compute/heartbeat"),
        ("TRACE", "/compute"),
    ):
        answer = await api.http.request(method, path)
        error_of(answer, 405, "METHOD_NOT_ALLOWED")
        assert method not in answer.headers["allow"]


async def test_conflicts(api: Api) -> None:
    node = (await api.http.post("/passports", json=NODE)).json()["id"]
    error = error_of(await api.http.post("/passports", json=NODE), 409, "PASSPORT_EXISTS")
    assert error["details"] == {"passportId": node}
    await api.http.post("/passports", json=MODEL)
    taken = await api.http.post("/passports", json={**MODEL, "owner": "acme"})
    assert error_of(taken, 409, "MODEL_NAME_TAKEN")["details"] == {"name": "m"}
    for name, status in (("x", 201), ("y", 409)):
        again = await api.http.post("/passports", json={**NODE, "name": name}, headers={"Idempotency-Key": "k"})
        assert again.status_code == status
    error_of(again, 409, "IDEMPOTENCY_CONFLICT")
    api.replica.fleet.replicas.own_in_flight[node] = 4
    busy = await api.http.post(f"/compute/deregister/{node}")
    assert error_of(busy, 409, "REQUESTS_IN_FLIGHT")["details"] == {"inFlight": 4}


async def test_a_node_that_has_ended(api: Api) -> None:
    deregistered, revoked = await api.register("a"), await api.register("b")
    await api.http.post(f"/compute/deregister/{deregistered}")
    await api.http.delete(f"/passports/{revoked}")
    for node in (deregistered, revoked):
        for answer in (
            await api.beat(node),
            await api.http.get(f"/compute/health/{node}"),
            await api.http.get(f"/compute/models/{node}"),
            await api.http.put(f"/compute/models/{node}", json={"models": []}),
            await api.http.post(f"/compute/drain/{node}"),
            await api.http.post(f"/compute/resume/{node}"),
        ):
            error_of(answer, 410, "NODE_DEREGISTERED")


async def test_a_body_over_a_mebibyte(api: Api) -> None:
    for route in ("/passports", "/compute/heartbeat", "/keys"):
        answer = await api.http.post(route, content=b'"' + b"x" * 1024 * 1024 + b'"')
        assert error_of(answer, 413, "PAYLOAD_TOO_LARGE")["details"] == {"limitBytes": 1024 * 1024}


async def test_too_many_heartbeats_and_too_many_wrong_keys(database_url: str) -> None:
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0.01, auth_failures_per_minute=2)
    async with open_api(database_url, settings) as api:
        node = await api.register()
        beats = [await api.beat(node) for _ in range(7)]
        stranger = httpx.AsyncClient(
            transport=httpx.ASGITransport(api.app, client=("203.0.113.9", 1)),
            base_url="http://lucid",
            headers={"Authorization": "Bearer wrong"},
        )
        guesses = [await stranger.get("/compute") for _ in range(6)]
        assert guesses[0].status_code == 401
        limited = next(guess for guess in guesses if guess.status_code != 401)
        for answer in (beats[-1], limited):
            error_of(answer, 429, "RATE_LIMITED")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await api.http.get("/compute")).status_code == 200


async def test_too_many_heartbeats_waiting_for_the_database(api: Api) -> None:
    node = await api.register()
    api.replica.heartbeats.max_waiting = 0
    answer = await api.beat(node)
    error_of(answer, 503, "OVERLOADED")
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_database_that_does_not_answer(database_url: str) -> None:
    """Every write and every read of Postgres is a 503 with Retry-After while it is stuck, and holds afterwards."""
    settings = Settings(bootstrap_admin_key=ADMIN_KEY, database_timeout_seconds=0.3)
    async with open_api(database_url, settings) as api:
        node = await api.register()
        stuck = await connect(database_url, application="lucid tests")
        try:
            await stuck.execute("BEGIN; LOCK TABLE passports, heartbeats, api_keys, audit_log IN ACCESS EXCLUSIVE MODE")
            answers = await asyncio.gather(
                api.http.post("/passports", json=NODE),
                api.http.patch(f"/passports/{node}", json={"description": "x"}),
                api.http.get("/passports"),
                api.http.get(f"/passports/{node}"),
                api.beat(node),
                api.http.post(f"/compute/drain/{node}"),
                api.http.post(f"/compute/deregister/{node}"),
                api.http.get("/keys"),
                api.http.get("/audit"),
            )
            for answer in answers:
                error_of(answer, 503, "DATABASE_UNAVAILABLE")
                assert int(answer.headers["retry-after"]) >= 1
            for path in ("/models", "/compute", f"/compute/health/{node}", "/healthz"):
                assert (await api.http.get(path)).status_code == 200
        finally:
            await stuck.close()
        assert (await api.beat(node)).status_code == 200
        assert (await api.http.patch(f"/passports/{node}", json={"description": "x"})).status_code == 200
