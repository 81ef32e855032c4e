"""A base URL that ends in a version of its own: requests, probes and the agent use it as it is."""

from __future__ import annotations

import json

import pytest

from lucid_compute.agent.runtimes.inference_server import InferenceServer
from tests.api import Api, error_code
from tests.express_client import Entrance
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, chat_answer

NOT_FOUND = Behaviour(answer=respond(b'{"detail":"Not Found"}', status=404))
LIST = Behaviour(answer=respond(json.dumps({"data": [{"id": "tiny"}]}).encode()))
BASES = [("", "/v1"), ("/v1", "/v1"), ("/V1/", "/V1"), ("/api/paas/v4", "/api/paas/v4"), ("/v3", "/v3")]
BASES += [("/v1beta/openai/", "/v1beta/openai"), ("/llama", "/llama/v1")]
ROOTS = {"/api/paas/v4": "/api/paas", "/llama/v1": "/llama"}  # all others are at the top


def node_below(base: str, number: int) -> FaultNode:
    """Return a node that serves a list of models and chats below `base`, and nothing else, at an address of its own."""
    node = FaultNode(NOT_FOUND, host=f"127.0.2.{number + 1}")  # because a host is probed once in ten seconds
    node.by_path |= {f"{base}/models": LIST, f"{base}/chat/completions": Behaviour(answer=chat_answer())}
    return node


async def test_a_node_is_asked_and_probed_below_its_base(api: Api, entrance: Entrance) -> None:
    await api.add_model("tiny", "gguf")
    for number, (path, base) in enumerate(BASES):
        async with node_below(base, number) as node:
            node_id = await api.register(path or "none", {"inferenceUrl": node.url + path, "runtimes": ["llama.cpp"]})
            assert (await api.beat(node_id, availableModels=["tiny"])).status_code == 200
            body = {"model": "tiny", "messages": QUESTION, "lucid": {"nodeIds": [node_id]}}
            for _ in range(2):  # the second one finds an idle connection
                assert (await entrance(api).http.post("/v1/chat/completions", json=body)).status_code == 200, path
            probed = (await api.http.post(f"/compute/probe/{node_id}")).json()
            assert probed["code"] == "ok", (path, probed)
            assert {request.path for request in node.requests} == {f"{base}/chat/completions", f"{base}/models"}


async def test_an_upstream_is_asked_below_its_base(api: Api) -> None:
    for number, (path, base) in enumerate(BASES):
        async with node_below(base, number) as node:
            await api.add_model(f"tiny-{number}", "api", upstream={"url": node.url + path, "model": "its own"})
            body = {"model": f"tiny-{number}", "messages": QUESTION}
            assert (await api.http.post("/v1/chat/completions", json=body)).status_code == 200, path
            assert [request.path for request in node.requests] == [f"{base}/chat/completions"]


@pytest.mark.parametrize(("path", "base"), BASES)
async def test_the_agent_asks_its_server_below_the_base_and_for_metrics_beside_it(path: str, base: str) -> None:
    async with node_below(base, 0) as node:
        server = InferenceServer(node.url + path)
        assert (await server.get("/v1/models")).is_ok
        await server.get("/metrics")
        await server.close()
        assert [request.path for request in node.requests] == [f"{base}/models", f"{ROOTS.get(base, '')}/metrics"]


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/completions/", "/api/paas/v4/embeddings"])
async def test_an_endpoint_is_refused_as_a_base_when_it_is_registered_or_changed(api: Api, endpoint: str) -> None:
    url = f"http://gpu.example:8080{endpoint}"
    node = {"name": "node", "type": "compute", "metadata": {"gpu": "g", "vram": "8GB", "inferenceUrl": url}}
    model = {"name": "m", "type": "model", "metadata": {"format": "api", "upstream": {"url": url}}}
    for body, path in ((node, "metadata.inferenceUrl"), (model, "metadata.upstream.url")):
        refused = await api.http.post("/passports", json=body)
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
        (fault,) = refused.json()["error"]["details"]["fields"]
        assert fault["path"] == path
        assert "send the base URL, without " in fault["message"]
    node_id = await api.register("node")
    changed = await api.http.patch(f"/passports/{node_id}", json={"metadata": {"inferenceUrl": url}})
    assert (changed.status_code, error_code(changed)) == (422, "INVALID_REQUEST")
