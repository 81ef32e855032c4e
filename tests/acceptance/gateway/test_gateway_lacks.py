"""Nodes that do not offer what is asked for: sound ones, which are passed over for it and for nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, Gateway
from tests.llama import llama_server

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": QUESTION},
    "completions": {"prompt": "go on"},
    "embeddings": {"input": "word"},
    "responses": {"input": "go on"},
}
NO_ENDPOINT = b'{"error":{"code":501,"message":"This server does not support it.","type":"not_supported_error"}}'
NO_MODEL = b'{"error":{"message":"The model `m` does not exist.","type":"NotFoundError","param":"model","code":404}}'
BURST = 30  # far more than may be tried again without earning it


def lacking(endpoint: str, status: int, body: bytes = NO_ENDPOINT) -> FaultNode:
    """A node that chats and completes, and does not offer the endpoint."""
    node = FaultNode()
    node.by_path[f"/v1/{endpoint}"] = Behaviour(answer=respond(body, status=status))
    return node


async def ask(gateway: Gateway, endpoint: str, model: str, **body: Any) -> httpx.Response:
    """Send a request to an endpoint."""
    return await gateway.raw.post(f"/v1/{endpoint}", json={"model": model, **BODIES[endpoint], **body})


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_node_without_the_endpoint_is_asked_once_and_not_blamed(
    gateway: Gateway, endpoint: str, status: int
) -> None:
    """Another one serves the endpoint; this one goes on with the others, its breaker closed and its errors none."""
    other = "completions" if endpoint != "completions" else "chat/completions"
    async with lacking(endpoint, status) as bad, FaultNode() as good:
        model = await gateway.add_model()
        bad_id = await gateway.add_node(bad.url, model)
        good_id = await gateway.add_node(good.url, model, beat={"load": 1})
        answers = [await ask(gateway, endpoint, model) for _ in range(8)]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert {answer.headers["x-lucid-node"] for answer in answers} == {good_id}
        assert [answer.headers["x-lucid-attempts"] for answer in answers] == ["2"] + ["1"] * 7
        assert len(bad.requests) == 1
        first = min(await gateway.jobs(model, 9), key=lambda job: (job["startedAt"], job["attempt"]))
        assert (first["outcome"], first["reason"]) == ("rejected", "endpoint_not_offered")
        assert not (await gateway.health(bad_id))["errorRate"]
        assert (await ask(gateway, other, model, lucid={"nodeIds": [bad_id]})).status_code == 200


async def test_when_no_node_has_the_endpoint_the_client_is_told_so(gateway: Gateway) -> None:
    """At the first request and at all others the same, and the ledger names the cause."""
    async with lacking("embeddings", 501) as one, lacking("embeddings", 404, b"nothing here") as two:
        model = await gateway.add_model()
        for node in (one, two):
            await gateway.add_node(node.url, model)
        for _ in range(7):
            refused = await ask(gateway, "embeddings", model)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (503, "MODEL_UNAVAILABLE"), refused.text
            assert error["details"]["rejections"]["MODEL_NOT_SERVED"] >= 2
            assert "not offered at /v1/embeddings by 2 of them" in error["message"]
            assert refused.headers["retry-after"]
        assert len(one.requests) == len(two.requests) == 1
        assert (await ask(gateway, "chat/completions", model)).status_code == 200
        reasons = [job["reason"] for job in await gateway.jobs(model, 3)]
        assert sorted(filter(None, reasons)) == ["endpoint_not_offered"] * 2


async def test_a_model_that_a_node_does_not_have_is_missed_at_every_endpoint_and_no_other_model_is(
    gateway: Gateway,
) -> None:
    """As vLLM and Ollama say it; the node's other model is served, and so is this one by another node."""
    async with (
        lacking("chat/completions", 404, NO_MODEL) as bad,
        FaultNode() as good,
    ):
        model, other = await gateway.add_model(), await gateway.add_model()
        bad_id = await gateway.add_node(bad.url, model, other)
        await gateway.add_node(good.url, model, beat={"load": 1})
        for endpoint in ("chat/completions", "completions", "embeddings"):
            assert (await ask(gateway, endpoint, model)).status_code == 200
        assert len(bad.requests) == 1
        reasons = {job["reason"] for job in await gateway.jobs(model, 4)}
        assert reasons == {None, "model_not_offered"}
        bad.by_path.clear()
        asked = await ask(gateway, "chat/completions", other)
        assert (asked.status_code, asked.headers["x-lucid-node"]) == (200, bad_id)


async def test_a_burst_for_an_endpoint_that_half_of_the_nodes_lack_is_served_whole(gateway: Gateway) -> None:
    """What was refused at once is tried elsewhere whatever retries are left, and streams are no different."""
    async with lacking("chat/completions", 501) as bad, FaultNode() as good:
        model = await gateway.add_model()
        await gateway.add_node(bad.url, model)
        await gateway.add_node(good.url, model)
        answers = await asyncio.gather(
            *(ask(gateway, "chat/completions", model, stream=bool(number % 2)) for number in range(BURST))
        )
        assert {answer.status_code for answer in answers} == {200}


async def test_an_answer_that_only_one_node_stored_says_nothing_of_the_others(gateway: Gateway) -> None:
    """A 404 for it may be the client's own, who is told so: the endpoint stays."""
    body = json.dumps({"error": {"message": "Response with id 'resp_1' not found.", "code": 404}}).encode()
    async with lacking("responses", 404, body) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model)
        refused = await ask(gateway, "responses", model, previous_response_id="resp_1")
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            404,
            "Response with id 'resp_1' not found.",
        )
        node.by_path.clear()
        assert (await ask(gateway, "responses", model)).status_code == 200


async def test_llama_cpp_without_embeddings_stays_sound(gateway: Gateway, tmp_path: Path) -> None:
    """It answers 501 there; its chats go on however often it was asked."""
    with llama_server(tmp_path) as llama:
        model = await gateway.add_model()
        node = await gateway.add_node(llama.url, model)
        for _ in range(6):
            refused = await ask(gateway, "embeddings", model)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "MODEL_UNAVAILABLE"), refused.text
        answer = await ask(gateway, "chat/completions", model, max_tokens=4)
        assert (answer.status_code, answer.headers["x-lucid-node"]) == (200, node), answer.text
        assert not (await gateway.health(node))["errorRate"]
