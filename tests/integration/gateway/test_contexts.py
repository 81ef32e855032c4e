"""Nodes with contexts of different lengths: a request that is too long for one goes to one that it fits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest

from lucid_compute.gateway.breakers import RETRIES_ALWAYS
from lucid_compute.server.settings import Settings
from tests.api import Api, error_code, open_api
from tests.express_client import Entrance
from tests.fault_answers import OK_BODY, respond
from tests.fault_node import Behaviour, FaultNode
from tests.integration.gateway.test_node_responses import ask, jobs_of

# As the servers write them.
TOO_LONG = {
    "vLLM": b'{"object":"error","message":"This model\'s maximum context length is 512 tokens. However, you requested'
    b' 2000 tokens in the messages, Please reduce the length of the messages.","type":"BadRequestError","code":400}',
    "newer vLLM": b'{"error":{"message":"The decoder prompt (length 2000) is longer than the maximum model length of'
    b' 512. Make sure that `max_model_len` is no smaller than the number of text tokens.","code":400}}',
    "SGLang": b'{"object":"error","message":"The input (2000 tokens) is longer than the model\'s context length'
    b' (512 tokens).","code":400}',
    "llama.cpp": b'{"error":{"code":400,"message":"the request exceeds the available context size, try increasing it",'
    b'"type":"exceed_context_size_error","n_prompt_tokens":2000,"n_ctx":512}}',
    "TGI": b'{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512. Given: 2000 `inputs`'
    b' tokens and 20 `max_new_tokens`","error_type":"validation"}',
    "Ollama": b'{"error":{"message":"the input length exceeds the context length","type":"api_error"}}',
    "OpenAI": b'{"error":{"message":"Too much.","type":"invalid_request_error","code":"context_length_exceeded"}}',
    "Anthropic": b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 2000 tokens'
    b' > 512 maximum"}}',
}
REFUSED = TOO_LONG["vLLM"]


class Nodes(NamedTuple):
    """A replica with the model `m` on nodes, the first of which is tried first."""

    api: Api
    servers: list[FaultNode]
    ids: list[str]

    @property
    def asked(self) -> list[int]:
        """How many requests each node got."""
        return [len(server.requests) for server in self.servers]

    async def send(self, **body: Any) -> tuple[int, bytes]:
        """Return status and body of a response; nothing that a node did before counts."""
        self.api.replica.gateway.context.stats.nodes.clear()
        for server in self.servers:
            server.requests.clear()
        answer = await ask(self.api, **body)
        return answer.status_code, answer.content


@asynccontextmanager
async def nodes_of(api: Api, *contexts: int | None) -> AsyncIterator[Nodes]:
    """Run a node for each context, in tokens; None declares none. All but the last refuse every request as too long."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FaultNode()) for _ in contexts]
        await api.add_model("m", "gguf")
        ids = []
        for number, (server, context) in enumerate(zip(servers, contexts, strict=True)):
            ids.append(await api.register(f"node-{number}", {"inferenceUrl": server.url, "runtimes": ["llama.cpp"]}))
            beat = await api.beat(ids[-1], availableModels=["m"], load=min(number, 1))
            assert beat.status_code == 200
            declared = {"models": [{"id": "m", "maxTokens": context}]}
            assert (await api.http.put(f"/compute/models/{ids[-1]}", json=declared)).status_code == 200
            server.behaviour = Behaviour(answer=respond(REFUSED, status=400))
        servers[-1].behaviour = Behaviour()
        yield Nodes(api, servers, ids)


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


async def test_a_request_that_is_too_long_for_a_node_goes_to_one_with_a_longer_context(api: Api) -> None:
    """Whatever its server says, also for a stream. It is no failure of the node, and costs the key no retry."""
    async with nodes_of(api, 512, 32_768) as nodes:
        for words in TOO_LONG.values():
            nodes.servers[0].behaviour = Behaviour(answer=respond(words, status=422 if b"max_new" in words else 400))
            assert await nodes.send() == (200, OK_BODY)
            assert nodes.asked == [1, 1], words
        assert len(TOO_LONG) < RETRIES_ALWAYS
        for _ in range(RETRIES_ALWAYS):
            assert (await nodes.send(stream=True))[0] == 200
        jobs = await jobs_of(api, 2 * (len(TOO_LONG) + RETRIES_ALWAYS))
        refused = [job for job in jobs if job["passportId"] == nodes.ids[0]]
        assert {(job["outcome"], job["tokensIn"]) for job in refused} == {("rejected", None)}
        health = (await api.http.get(f"/compute/health/{nodes.ids[0]}")).json()
        assert not health["errorRate"]


async def test_a_node_without_a_longer_context_is_not_tried(api: Api) -> None:
    """Of several, only one that has more than all those that refused; the refusal is passed on as the node sent it."""
    async with nodes_of(api, 1024, 512, 1024) as nodes:
        assert await nodes.send() == (400, REFUSED)
        assert nodes.asked == [1, 0, 0]


async def test_a_longer_one_of_several_is_tried(api: Api) -> None:
    async with nodes_of(api, 1024, 512, 1024, 2048) as nodes:
        assert await nodes.send() == (200, OK_BODY)
        assert nodes.asked == [1, 0, 0, 1]


async def test_what_is_too_long_for_each_node_is_refused_as_the_last_one_says(api: Api) -> None:
    """The client's SDK finds the code that it compacts a conversation for."""
    async with nodes_of(api, 512, 32_768) as nodes:
        nodes.servers[-1].behaviour = Behaviour(answer=respond(TOO_LONG["OpenAI"], status=400))
        assert await nodes.send() == (400, TOO_LONG["OpenAI"])
        assert nodes.asked == [1, 1]


async def test_nodes_that_declare_no_context_are_tried_too(api: Api) -> None:
    async with nodes_of(api, None, None) as nodes:
        assert await nodes.send() == (200, OK_BODY)
        nodes.servers[-1].behaviour = nodes.servers[0].behaviour
        assert await nodes.send() == (400, REFUSED)
        assert nodes.asked == [1, 1]


async def test_a_busy_node_with_a_longer_context_is_worth_waiting_for(api: Api) -> None:
    async with nodes_of(api, 512, 32_768) as nodes:
        nodes.servers[-1].behaviour = Behaviour(answer=respond(b"{}", "Retry-After: 7", status=429))
        api.replica.gateway.context.stats.nodes.clear()
        answer = await ask(api)
        assert (error_code(answer), answer.headers["retry-after"]) == ("MODEL_UNAVAILABLE", "7")
        assert answer.json()["error"]["details"]["rejections"]["AT_CAPACITY"] == 1


async def test_any_other_refusal_is_the_clients_and_final(api: Api) -> None:
    async with nodes_of(api, 512, 32_768) as nodes:
        for words in (b'{"error":{"message":"tool_choice: unknown","code":400}}', b'{"detail":"messages is missing"}'):
            nodes.servers[0].behaviour = Behaviour(answer=respond(words, status=400))
            assert await nodes.send() == (400, words)
            assert nodes.asked == [1, 0]


async def test_a_route_goes_on_to_a_model_with_a_longer_context(api: Api) -> None:
    async with nodes_of(api, 512) as nodes, FaultNode() as other:
        nodes.servers[0].behaviour = Behaviour(answer=respond(REFUSED, status=400))
        await api.add_model("long", "gguf")
        other_id = await api.register("other", {"inferenceUrl": other.url, "runtimes": ["llama.cpp"]})
        assert (await api.beat(other_id, availableModels=["long"])).status_code == 200
        await api.add_model("chat", "gguf", route={"weights": {"m": 1}, "fallbacks": ["long"]})
        assert await nodes.send(model="chat") == (200, OK_BODY)
        assert await nodes.send() == (400, REFUSED)
