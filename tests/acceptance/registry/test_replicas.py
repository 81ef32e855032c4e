"""Several `lucid serve` on one database: they agree within two seconds, and a database that hangs is lived through."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, eventually, serving

AGREE_SECONDS = 2.0
SLACK = 3
REFUSAL_SECONDS = 2.5
BEAT: dict[str, Any] = {"status": "healthy", "load": None, "availableModels": ["tiny"], "queueDepth": None}


@pytest.fixture(params=["true", "false"], ids=["notified", "with NOTIFY blocked"])
async def pair(
    request: pytest.FixtureRequest, database_url: str
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of two services on one database, the admin's."""
    follows = str(request.param)
    with (
        serving(database_url, FEED_FOLLOWS_NOTIFICATIONS=follows) as first,
        serving(database_url, FEED_FOLLOWS_NOTIFICATIONS=follows) as second,
    ):
        async with first.client() as one, second.client() as other:
            yield one, other


async def register(client: httpx.AsyncClient, name: str) -> str:
    """Register the guide's node, with a runtime; return its id."""
    body = {**GUIDE_PASSPORT, "name": name, "metadata": {**GUIDE_PASSPORT["metadata"], "runtimes": ["llama.cpp"]}}
    answer = await client.post("/passports", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def ask(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """Return the body of a GET that has to succeed."""
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def agrees(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the other replica sees it, which has to be soon."""
    await eventually(holds, within(AGREE_SECONDS))


async def test_two_replicas_agree_on_a_nodes_whole_life(pair: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    """Registration, heartbeat, declaration, drain, resume and deregistration through one are seen through the other."""
    one, other = pair
    body = {"name": "tiny", "type": "model", "metadata": {"format": "gguf"}}
    assert (await one.post("/passports", json=body)).status_code == 201
    node = await register(one, "seen by both")

    async def is_listed() -> bool:
        nodes = (await ask(other, "/compute"))["nodes"]
        return bool([shown["id"] for shown in nodes] == [node])

    async def is_available() -> bool:
        listed = (await ask(other, "/models?available=true"))["models"]
        return bool([model["name"] for model in listed] == ["tiny"])

    async def is_unavailable() -> bool:
        return not await is_available()

    async def is_fresh() -> bool:
        return bool((await ask(other, f"/compute/health/{node}"))["fresh"])

    async def is_declared() -> bool:
        models = (await ask(other, f"/compute/models/{node}"))["models"]
        return bool([model["id"] for model in models] == ["tiny-q4"])

    async def is_drained() -> bool:
        health = await ask(one, f"/compute/health/{node}")  # which asks whether every replica has applied it
        return bool(health["drained"] and (await ask(other, f"/compute/health/{node}"))["status"] == "draining")

    async def is_deregistered() -> bool:
        return (await other.get(f"/compute/health/{node}")).status_code == 410

    await agrees(is_listed)
    assert (await one.post("/compute/heartbeat", json={**BEAT, "passportId": node})).status_code == 200
    await agrees(is_fresh)
    await agrees(is_available)
    assert (await one.put(f"/compute/models/{node}", json={"models": [{"id": "tiny-q4"}]})).status_code == 200
    await agrees(is_declared)
    assert (await one.post(f"/compute/drain/{node}")).status_code == 202
    await agrees(is_unavailable)
    await agrees(is_drained)
    assert (await one.post(f"/compute/resume/{node}")).status_code == 200
    await agrees(is_available)
    assert (await one.post(f"/compute/deregister/{node}")).status_code == 200
    await agrees(is_unavailable)
    await agrees(is_deregistered)


async def test_two_replicas_agree_on_keys(pair: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    """A key made through one opens the other at once; revoked through one it soon opens neither."""
    one, other = pair
    body = {"name": "passing", "owner": "acme", "scopes": ["compute"]}
    made = (await one.post("/keys", json=body)).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert (await other.get("/compute", headers=headers)).status_code == 200
    assert (await one.delete(f"/keys/{made['id']}")).status_code == 204
    assert (await one.get("/compute", headers=headers)).status_code == 401

    async def is_refused() -> bool:
        return (await other.get("/compute", headers=headers)).status_code == 401

    await agrees(is_refused)


async def test_a_heartbeat_repeated_at_another_replica_changes_nothing(
    pair: tuple[httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    """A sender that retries elsewhere is answered the same, also where the first one is not known yet."""
    one, other = pair
    for number in range(5):
        node = await register(one, f"retries {number}")
        body = {**BEAT, "passportId": node, "bootId": "a", "sequence": 1}
        first = await one.post("/compute/heartbeat", json=body)
        second = await other.post("/compute/heartbeat", json=body)
        assert (first.status_code, second.status_code) == (200, 200), second.text
        assert second.json()["receivedAt"] == first.json()["receivedAt"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A service on an embedded Postgres, whose processes are ours to stop."""
    with serving() as served:
        yield served


async def test_a_database_that_hangs_costs_only_what_needs_it(served: Served) -> None:
    """Writes and heartbeats answer 503 with Retry-After in time, models stay readable, and it heals by itself."""
    async with served.client() as client:
        node = await register(client, "beats on")
        beat = {**BEAT, "passportId": node}
        assert (await client.post("/compute/heartbeat", json=beat)).status_code == 200
        with stopped(served.postgres()):
            refusals = await asyncio.gather(
                timed(client.post("/compute/heartbeat", json=beat)),
                timed(client.post("/passports", json={**GUIDE_PASSPORT, "name": "too late"})),
                timed(client.post(f"/compute/drain/{node}")),
                timed(client.get("/passports")),
                timed(client.get("/readyz")),
            )
            models, seconds = await timed(client.get("/models?available=true"))
            assert models.status_code == 200
            assert seconds <= within(REFUSAL_SECONDS)
            assert (await client.get("/healthz")).status_code == 200
        for answer, seconds in refusals:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "DATABASE_UNAVAILABLE"
            assert int(answer.headers["retry-after"]) >= 1
            assert seconds <= within(REFUSAL_SECONDS)

        async def is_whole_again() -> bool:
            ready = (await client.get("/readyz")).status_code == 200
            return ready and (await client.post("/compute/heartbeat", json=beat)).status_code == 200

        await eventually(is_whole_again, within(AGREE_SECONDS))
        assert (await client.post(f"/compute/drain/{node}")).status_code == 202


@contextmanager
def stopped(pids: set[int]) -> Iterator[None]:
    """Hold every one of the processes up, as a disk that hangs would."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def timed(call: Awaitable[httpx.Response]) -> tuple[httpx.Response, float]:
    """Return the response, and how many seconds it took."""
    began = time.monotonic()
    return await call, time.monotonic() - began


def within(seconds: float) -> float:
    """Return a stated bound with threefold slack: machines are noisy."""
    return seconds * SLACK
