"""What a key's limits of models, requests at once and dollars refuse, at both entrances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime

import httpx
import pytest

from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.express_client import Entrance
from tests.fault_node import Behaviour, Ending, FaultNode

BODY = {"messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


async def add_node(api: Api, node: FaultNode, **metadata: object) -> None:
    """Register a node that serves `tiny`, also known as `small-one`, and `other`."""
    await api.add_model("tiny", "gguf", aliases=["small-one"])
    await api.add_model("other", "gguf")
    passport_id = await api.register("node", {"inferenceUrl": node.url, "runtimes": ["llama.cpp"], **metadata})
    assert (await api.beat(passport_id, availableModels=["tiny", "other"])).status_code == 200


async def key_with(api: Api, entrance: Entrance, **limits: object) -> Api:
    """The same replica, asked with a new key that has these limits."""
    return entrance(await api.new_key("acme", ["inference:run"], limits=limits))


async def ask(api: Api, model: str = "tiny", **headers: str) -> httpx.Response:
    """Send a chat completion."""
    return await api.http.post("/v1/chat/completions", json={**BODY, "model": model}, headers=headers, timeout=30)


async def test_a_key_may_use_the_models_that_its_limits_name(api: Api, entrance: Entrance) -> None:
    """A pattern allows a model by any of its names. Another model is 403 in OpenAI's shape, and no node is asked."""
    async with FaultNode() as node:
        await add_node(api, node)
        limited = await key_with(api, entrance, models=["small-*"])
        assert (await ask(limited)).status_code == (await ask(limited, "small-one")).status_code == 200
        refused = await ask(limited, "other")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (403, "MODEL_NOT_ALLOWED")
        assert "'other'" in error["message"]
        assert "small-*" in error["message"]
        assert len(node.requests) == 2


async def test_requests_at_once_are_limited(api: Api, entrance: Entrance) -> None:
    """While one of one runs, the next is 429 with Retry-After. One is served when it has ended or failed."""
    async with FaultNode(Behaviour(delay_seconds=3)) as node:
        await add_node(api, node)
        limited = await key_with(api, entrance, concurrency=1)
        running = asyncio.create_task(ask(limited))
        while len(node.requests) < 1:  # noqa: ASYNC110 - the node is another server's state
            await asyncio.sleep(0.01)
        refused = await ask(limited)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert refused.headers["retry-after"] == "1"
        node.behaviour = Behaviour()
        assert (await ask(api)).status_code == 200  # another key's requests are not counted
        assert (await running).status_code == 200
        assert (await ask(limited, "unknown")).status_code == 404
        assert (await ask(limited)).status_code == 200
        node.behaviour = Behaviour(cut_body_after=0, ending=Ending.CLOSE)
        assert (await ask(limited)).status_code == 502
        node.behaviour = Behaviour()
        assert (await ask(limited)).status_code == 200


async def test_changed_limits_hold_for_the_next_request(api: Api, entrance: Entrance) -> None:
    """Also for a key whose limit is spent: what it has used counts on, and the headers say what is left."""
    async with FaultNode() as node:
        await add_node(api, node)
        limited = await key_with(api, entrance, requestsPerMinute=1)
        key_id = str(limited.key).split("_")[2]
        assert (await ask(limited)).status_code == 200
        assert (await ask(limited)).status_code == 429
        changed = await api.http.patch(f"/keys/{key_id}", json={"limits": {"requestsPerMinute": 3}})
        assert changed.status_code == 200, changed.text
        served = await ask(limited)
        assert (served.status_code, served.headers["x-ratelimit-remaining-requests"]) == (200, "1")
        await api.http.patch(f"/keys/{key_id}", json={"limits": {"models": ["other"], "requestsPerMinute": None}})
        assert (await ask(limited)).status_code == 403
        assert (await ask(limited, "other")).status_code == 200


async def test_a_spent_budget_refuses_until_its_period_ends(api: Api, entrance: Entrance) -> None:
    """The first request costs more than the budget. The next is 429 and names when the budget is full again."""
    async with FaultNode() as node:
        await add_node(api, node, pricePer1kTokens="10")
        limited = await key_with(api, entrance, budgetUsd="0.000001", budgetPeriod="day")
        assert (await ask(limited)).status_code == 200
        refused = await ask(limited)
        for _ in range(40):  # what a request has cost is read within a second
            if refused.status_code == 429:
                break
            await asyncio.sleep(0.1)
            refused = await ask(limited)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "BUDGET_EXCEEDED")
        now = api.replica.clock.now()
        assert f"{now:%Y-%m-%d}" < error["message"].rsplit(" ", 1)[1]
        assert int(refused.headers["retry-after"]) <= 86_400
        assert (await ask(api)).status_code == 200
        spent = (await limited.http.get("/usage")).json()["budgets"]
        assert datetime.fromisoformat(spent[0]["resetsAt"]) > now


async def test_x_api_key_names_a_key(api: Api) -> None:
    """`x-api-key` serves as `Authorization` does, also where both are sent and agree on nothing: the latter counts."""
    async with FaultNode() as node:
        await add_node(api, node)
        nobody = api.with_key("")
        nobody.http.headers.pop("authorization", None)
        assert (await ask(nobody, **{"x-api-key": str(api.key)})).status_code == 200
        assert (await ask(nobody, **{"x-api-key": "wrong"})).status_code == 401
        assert (await ask(api, **{"x-api-key": "wrong"})).status_code == 200
