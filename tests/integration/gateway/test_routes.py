"""Names that stand for several models: canaries by weight, fallbacks in order, and what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from tests.api import Api, error_code, open_api
from tests.express_client import Entrance
from tests.fault_answers import OK_BODY, chat_stream, respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.integration.gateway.test_node_responses import ask, jobs_of


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane, with the models `stable` and `canary`."""
    async with open_api(database_url, settings) as opened:
        for name in ("stable", "canary"):
            await opened.add_model(name, "gguf")
        yield entrance(opened)


async def add_node(api: Api, node: FaultNode, *models: str, **metadata: Any) -> str:
    """Register a node that serves these models."""
    name = " ".join(models)
    node_id = await api.register(name, {"inferenceUrl": node.url, "runtimes": ["llama.cpp"], **metadata})
    assert (await api.beat(node_id, availableModels=list(models))).status_code == 200
    return node_id


async def explain(api: Api, name: str) -> tuple[bool, bool, bool, bool]:
    """Return whether a model is available: by itself, in the filtered list, explained; and whether it is listed."""
    listed = (await api.http.get("/models", params={"available": "true"})).json()["models"]
    served = (await api.http.get("/v1/models")).json()["data"]
    return (
        (await api.http.get(f"/models/{name}")).json()["available"],
        name in {model["name"] for model in listed},
        (await api.http.get(f"/models/{name}/availability")).json()["available"],
        name in {model["id"] for model in served},
    )


async def test_requests_are_spread_by_weight_and_a_session_stays(api: Api) -> None:
    """The ledger, the price and the header name the model that served; the name asked has no node of its own."""
    async with FaultNode() as stable, FaultNode() as canary:
        await add_node(api, stable, "stable", pricePer1kTokens="1")
        await add_node(api, canary, "canary", pricePer1kTokens="2")
        await api.add_model("chat", "gguf", route={"weights": {"stable": 3, "canary": 1}})
        served = Counter([(await ask(api, model="chat")).headers["x-lucid-model"] for _ in range(100)])
        assert served == {"stable": len(stable.requests), "canary": len(canary.requests)}
        assert 5 < served["canary"] < 50
        assert b'"model":"canary"' in canary.requests[0].body
        jobs = await jobs_of(api, 100)
        assert Counter(job["model"] for job in jobs) == served
        for user in map(str, range(10)):
            by_user = [(await ask(api, model="chat", user=user)).headers["x-lucid-model"] for _ in range(3)]
            matched = (await api.http.post("/match", json={"model": "chat", "user": user})).json()
            assert {matched["servedBy"]} == set(by_user)
        assert "x-lucid-model" not in (await ask(api, model="stable")).headers


async def test_the_next_model_serves_when_the_first_cannot(api: Api) -> None:
    """Away, failing, at its limit, or an upstream that refuses: each is replaced before the first byte."""
    down = Behaviour(cut_body_after=0, ending=Ending.CLOSE)
    async with FaultNode() as node, FaultNode(Behaviour(answer=respond(OK_BODY, status=500))) as bad:
        await api.add_model("chat", "gguf", route={"fallbacks": ["unknown", "canary", "stable"]})
        assert (await ask(api, model="chat")).status_code == 503
        assert await explain(api, "chat") == (False, False, False, False)
        await add_node(api, node, "stable")
        assert await explain(api, "chat") == (True, True, True, True)
        assert (await ask(api, model="chat")).headers["x-lucid-model"] == "stable"
        await add_node(api, bad, "canary")
        answered = await ask(api, model="chat")
        assert (answered.headers["x-lucid-model"], answered.headers["x-lucid-attempts"]) == ("stable", "2")
        tried = [(job["model"], job["attempt"]) for job in await jobs_of(api, 3)]
        assert sorted(tried) == [("canary", 1), ("stable", 1), ("stable", 2)]
        node.behaviour = bad.behaviour = down
        failed = await ask(api, model="chat")
        assert (failed.status_code, len(failed.json()["error"]["details"]["attempts"])) == (502, 2)
        upstream = {"url": bad.url, "model": "m"}
        await api.add_model("api", "api", upstream=upstream, route={"fallbacks": ["stable"]})
        node.behaviour = Behaviour()
        assert (await ask(api, model="api")).headers["x-lucid-model"] == "stable"


async def test_a_node_that_is_full_sends_requests_to_the_next_model(api: Api) -> None:
    async with FaultNode() as node, FaultNode() as busy:
        await add_node(api, node, "stable")
        busy.behaviour = Behaviour(answer=respond(b"{}", "Retry-After: 60", status=429))
        await add_node(api, busy, "canary")
        await api.add_model("chat", "gguf", route={"weights": {"canary": 1}, "fallbacks": ["stable"]})
        assert [(await ask(api, model="chat")).headers["x-lucid-attempts"] for _ in range(2)] == ["2", "1"]
        assert len(busy.requests) == 1


async def test_a_route_leads_around_no_limit_of_a_key(api: Api, entrance: Entrance) -> None:
    """A key needs the name and a model behind it; models that it may not use are left out."""
    async with FaultNode() as node:
        await add_node(api, node, "stable", "canary")
        await api.add_model("small-chat", "gguf", route={"weights": {"stable": 9}, "fallbacks": ["canary"]})
        for models, status, model in (
            (["small-*"], 403, None),
            (["stable", "canary"], 403, None),
            (["small-*", "canary"], 200, "canary"),
            (["small-*", "stable"], 200, "stable"),
        ):
            limited = entrance(await api.new_key("acme", ["inference:run"], limits={"models": models}))
            answered = await ask(limited, model="small-chat")
            assert (answered.status_code, answered.headers.get("x-lucid-model")) == (status, model)
            matched = await limited.http.post("/match", json={"model": "small-chat"})
            assert matched.json().get("servedBy") == model or models == ["stable", "canary"]


async def test_match_and_availability_show_the_route(api: Api) -> None:
    """A route is followed once, so two that name each other do no harm; one that is removed is gone at once."""
    async with FaultNode() as node:
        node_id = await add_node(api, node, "stable")
        a = await api.add_model("a", "gguf", route={"weights": {"b": 1}, "fallbacks": ["stable"]})
        b = await api.add_model("b", "gguf", route={"weights": {"a": 1}})
        stable = (await api.http.get("/models/stable")).json()["id"]
        matched = (await api.http.post("/match", json={"model": "a"})).json()
        route = [
            {"model": "b", "modelPassportId": b, "weight": 1, "available": True, "served": False},
            {"model": "stable", "modelPassportId": stable, "weight": None, "available": True, "served": True},
        ]
        assert (matched["model"], matched["modelPassportId"], matched["servedBy"]) == ("a", a, "stable")
        assert (matched["route"], matched["chosen"]["passportId"]) == (route, node_id)
        assert (await api.http.get("/models/a/availability")).json()["route"] == route
        assert (await api.http.get("/models/a")).json()["metadata"]["route"]["fallbacks"] == ["stable"]
        assert await explain(api, "b") == (True, True, True, False)
        assert error_code(await ask(api, model="b")) == "MODEL_UNAVAILABLE"
        plain = (await api.http.post("/match", json={"model": "stable"})).json()
        assert (plain["servedBy"], plain["route"]) == (None, [])
        assert "route" not in (await api.http.get("/models/stable/availability")).json()
        await api.http.patch(f"/passports/{a}", json={"metadata": {"route": None}})
        assert await explain(api, "a") == (True, True, True, False)
        assert (await ask(api, model="a")).status_code == 503


async def test_a_stream_falls_back_before_its_first_byte_only(api: Api) -> None:
    async with FaultNode() as node, FaultNode(Behaviour(cut_body_after=0, ending=Ending.CLOSE)) as bad:
        await add_node(api, node, "stable")
        await add_node(api, bad, "canary")
        await api.add_model("chat", "gguf", route={"weights": {"canary": 1}, "fallbacks": ["stable"]})
        node.behaviour = Behaviour(answer=chat_stream("a"))
        answered = await ask(api, model="chat", stream=True)
        assert (answered.headers["x-lucid-model"], answered.text.endswith("[DONE]\n\n")) == ("stable", True)
