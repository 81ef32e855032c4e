"""Blame stays with who caused it: a client can't take a node from others, and a busy node has not failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.gateway.gateway import MAX_RANKINGS
from tests import needs_sources
from tests.api import Api, error_code
from tests.express_client import Entrance
from tests.fault_answers import Answer, respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, chat_answer

TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]


class Nodes(NamedTuple):
    """Nodes that serve `tiny`, and their ids."""

    api: Api
    servers: list[FaultNode]
    ids: list[str]

    async def warm_up(self) -> None:
        """Give each node an idle connection, so that the fast path can use it."""
        for node_id in self.ids:
            assert (await ask(self.api, lucid={"nodeIds": [node_id]})).status_code == 200
        for server in self.servers:
            server.requests.clear()

    def answer(self, *answers: Answer) -> None:
        """Let the nodes answer so from now on, in this order; the last one is of all further nodes too."""
        for number, server in enumerate(self.servers):
            server.behaviour = Behaviour(answer=answers[min(number, len(answers) - 1)])

    async def reasons(self) -> dict[str, int]:
        """Return why nodes would get no request of `tiny`, counted."""
        matched = await self.api.http.post("/match", json={"model": "tiny"})
        rejections: dict[str, int] = matched.json()["rejections"]
        return rejections

    def become_free(self) -> None:
        """Let the service forget that nodes were busy, and what it told of that."""
        gateway = self.api.replica.gateway
        gateway._rankings.clear()
        for node_id, server in zip(self.ids, self.servers, strict=True):
            gateway.context.stats.nodes[node_id].full_until = 0.0
            server.requests.clear()

    @property
    def asked(self) -> int:
        """How many requests the nodes got."""
        return sum(len(server.requests) for server in self.servers)


@asynccontextmanager
async def nodes_of(api: Api, count: int) -> AsyncIterator[Nodes]:
    """Run so many nodes that report `tiny`, each with an idle connection."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FaultNode(Behaviour(answer=chat_answer()))) for _ in range(count)]
        await api.add_model("tiny", "gguf")
        ids = []
        for number, server in enumerate(servers):
            ids.append(await api.register(f"node-{number}", {"inferenceUrl": server.url, "runtimes": ["llama.cpp"]}))
            assert (await api.beat(ids[-1], availableModels=["tiny"], load=0)).status_code == 200
        nodes = Nodes(api, servers, ids)
        await nodes.warm_up()
        yield nodes


async def ask(
    api: Api, endpoint: str = "chat/completions", content: bytes | None = None, **body: Any
) -> httpx.Response:
    """Send a request for `tiny`."""
    sent = content or json.dumps({"model": "tiny", "messages": QUESTION, **body}).encode()
    return await api.http.post(f"/v1/{endpoint}", content=sent, headers={"Content-Type": "application/json"})


def refusal(status: int, message: str, *headers: str, **fields: Any) -> Answer:
    """Return a refusal in OpenAI's shape."""
    return respond(json.dumps({"error": {"message": message, **fields}}).encode(), *headers, status=status)


async def keys_of(api: Api, entrance: Entrance, *owners: str) -> list[Api]:
    """Return clients with a key of each owner, at the entrance."""
    return [await entrance(api).new_key(owner, ["inference:run"]) for owner in owners]


# --- what a node lacks

STORED = {
    "a response": b'"previous_response_id":"resp_ model \'tiny\' "',
    "an escaped key": b'"previous\\u005fresponse_id":"resp_ model \'tiny\' "',
    "an escaped letter": b'"\\u0070revious_response_id":"resp_ model \'tiny\' "',
    "another case": b'"Previous_Response_ID":"resp_ model \'tiny\' "',
    "twice": b'"previous_response_id":null,"previous_response_id":"resp_ model \'tiny\' "',
    "a conversation": b'"conversation":{"id":"model \'tiny\'"}',
    "a prompt": b'"prompt":{"id":"model \'tiny\'"}',
    "an item": b'"input":[{"type":"item_reference","id":"model \'tiny\'"}]',
    "a file": b'"input":[{"role":"user","content":[{"type":"input_file","file_id":"model \'tiny\'"}]}]',
}


async def test_what_one_client_makes_nodes_say_takes_them_from_no_other(api: Api, entrance: Entrance) -> None:
    """Whatever it names, and however it writes the key; it is told the node's 404, which is no call to try again."""
    async with nodes_of(api, 3) as nodes:
        evil, victim = await keys_of(api, entrance, "evil", "victim")
        for kind, named in STORED.items():
            nodes.answer(refusal(404, "Response with id 'resp_ model 'tiny' ' not found.", code=404))
            refused = await ask(evil, "responses", b'{"model":"tiny",%b}' % named)
            assert refused.status_code == 404, (kind, refused.text)
            assert "Response with id" in refused.json()["error"]["message"]
            nodes.answer(respond())
            for endpoint in ("responses", "chat/completions"):
                served = await ask(victim, endpoint)
                assert (served.status_code, served.headers["x-lucid-attempts"]) == (200, "1"), (kind, endpoint)
            assert not await nodes.reasons()


async def test_requests_for_what_is_stored_elsewhere_use_up_their_own_retries(api: Api, entrance: Entrance) -> None:
    """Ten, as others do: nothing is learnt of them, so nothing else would end that."""
    async with nodes_of(api, 3) as nodes:
        nodes.answer(refusal(404, "Response with id 'r' not found."))
        (key,) = await keys_of(api, entrance, "evil")
        for _ in range(12):
            assert (await ask(key, "responses", previous_response_id="r")).status_code == 404
        assert nodes.asked == 12 + 10


async def test_a_null_names_nothing(api: Api, entrance: Entrance) -> None:
    """As SDKs send it; so the lack is learnt, and the node is not asked again."""
    async with nodes_of(api, 1) as nodes:
        nodes.answer(respond(b'{"detail":"Not Found"}', status=404))
        for _ in range(3):
            refused = await ask(entrance(api), "responses", previous_response_id=None, conversation=None, file_ids=[])
            assert (refused.status_code, error_code(refused)) == (503, "MODEL_UNAVAILABLE")
        assert nodes.asked == 1


async def test_what_a_node_lacks_counts_for_its_owner_at_once_and_for_all_after_two_owners(
    api: Api, entrance: Entrance
) -> None:
    async with nodes_of(api, 1) as nodes:
        nodes.answer(respond(b'{"detail":"Not Found"}', status=404))
        one, two, three = await keys_of(api, entrance, "one", "two", "three")
        told = []
        for key in (one, one, two, three, one):
            refused = await ask(key, "embeddings")
            assert (refused.status_code, error_code(refused)) == (503, "MODEL_UNAVAILABLE")
            assert refused.json()["error"]["details"]["rejections"]["MODEL_NOT_SERVED"] == 1
            told.append(nodes.asked)
        assert told == [1, 1, 2, 2, 2]
        nodes.answer(chat_answer())
        assert (await ask(three)).status_code == 200


async def test_only_a_code_or_a_sentence_with_the_id_that_was_sent_takes_a_model(api: Api, entrance: Entrance) -> None:
    """A 404 of anything else is about the endpoint."""
    forged = "No tool 'model gpt' not found"
    honest = "The model `tiny` does not exist."
    async with nodes_of(api, 1) as nodes:
        owners = iter(await keys_of(api, entrance, *"abcd"))
        for answer, chats in (
            (refusal(404, forged), 200),
            (refusal(404, honest), 503),
            (refusal(404, "gone", code="model_not_found"), 503),
            (refusal(404, "gone", param="model"), 503),
        ):
            owner = next(owners)
            nodes.answer(answer)
            assert (await ask(owner, "embeddings")).status_code == 503
            nodes.answer(chat_answer())
            assert (await ask(owner)).status_code == chats, answer


# --- requests that make nodes fail

OWN = {
    "llama.cpp, tools": refusal(500, "tools param requires --jinja flag", code=500, type="server_error"),
    "llama.cpp, a picture": refusal(500, "image input is not supported - hint: provide the mmproj"),
    "llama.cpp, a grammar": refusal(500, "Failed to initialize samplers: failed to parse grammar"),
    "Ollama": respond(b'{"error":"registry/library/tiny does not support tools"}', status=500),
    "TGI": respond(b'{"error":"Request failed during generation","error_type":"generation"}', status=424),
    "a server's own words": refusal(500, "Internal \\u0007 server\\nerror " + "x" * 5000),
}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_request_that_makes_nodes_fail_is_told_why_and_costs_nobody_else(
    api: Api, entrance: Entrance, count: int
) -> None:
    """No breaker opens, others' retries stay, and the reason comes in our shape, within bounds."""
    async with nodes_of(api, count) as nodes:
        evil, victim = await keys_of(api, entrance, "evil", "victim")
        for kind, answer in OWN.items():
            nodes.answer(answer)
            for _ in range(6):
                refused = await ask(evil, tools=TOOLS)
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (502, "NODE_FAILED"), kind
                assert 'The node said: "' in error["message"]
                assert len(refused.content) < 3000
                assert error["message"].isprintable()
                assert "breaker" not in refused.text
            assert error["details"]["nodeMessage"] in error["message"]
            assert not await nodes.reasons(), kind
        nodes.answer(chat_answer())
        for _ in range(3):
            assert (await ask(victim)).status_code == 200
        if count > 1:  # the victim's retries are all there
            nodes.servers[0].behaviour = Behaviour(answer=respond(b"{}", status=500))
            pinned = {"nodeIds": nodes.ids[:2]}
            assert {(await ask(victim, lucid=pinned)).status_code for _ in range(8)} == {200}


async def test_a_node_that_says_the_request_is_at_fault_has_no_error_rate(api: Api, entrance: Entrance) -> None:
    async with nodes_of(api, 1) as nodes:
        nodes.answer(OWN["llama.cpp, tools"])
        assert (await ask(entrance(api), tools=TOOLS)).status_code == 502
        jobs = await ended_jobs(api, 2)
        assert [(job["outcome"], job["reason"]) for job in jobs] == [("rejected", "http_500"), ("completed", None)]


async def test_a_node_that_fails_what_another_serves_is_blamed_as_ever(api: Api, entrance: Entrance) -> None:
    """Five times, then its breaker opens; at both entrances."""
    async with nodes_of(api, 2) as nodes:
        nodes.answer(respond(b'{"error":"boom"}', status=500), chat_answer())
        for _ in range(5):
            shun_no_longer(api, nodes.ids[0], nodes.ids[1])
            served = await ask(entrance(api))
            assert (served.status_code, served.headers["x-lucid-attempts"]) == (200, "2")
        assert await nodes.reasons() == {"BREAKER_OPEN": 1}


async def test_a_node_is_not_blamed_for_what_another_one_refuses(api: Api, entrance: Entrance) -> None:
    """The second one says what is wrong with the request that the first one broke at."""
    async with nodes_of(api, 2) as nodes:
        nodes.answer(respond(b'{"error":"boom"}', status=500), refusal(400, "no such tool"))
        for _ in range(6):
            shun_no_longer(api, nodes.ids[0], nodes.ids[1])
            refused = await ask(entrance(api))
            assert (refused.status_code, refused.headers["x-lucid-attempts"]) == (400, "2")
        assert not await nodes.reasons()


async def test_nodes_that_fail_alike_are_not_blamed_though_a_third_one_serves(api: Api, entrance: Entrance) -> None:
    """They may lack what the request asks for, as a third node does not."""
    async with nodes_of(api, 3) as nodes:
        nodes.answer(refusal(500, "boom"), refusal(500, "boom"), chat_answer())
        for _ in range(8):
            for preferred in nodes.ids[:2]:
                shun_no_longer(api, preferred, nodes.ids[2])
            served = await ask(entrance(api))
            assert (served.status_code, served.headers["x-lucid-attempts"]) == (200, "3")
            api.replica.gateway._retries = RetryBudgets()
        assert not await nodes.reasons()


async def test_a_client_that_picks_its_node_opens_no_breaker_of_it(api: Api, entrance: Entrance) -> None:
    """What only one node was asked proves nothing of it."""
    async with nodes_of(api, 2) as nodes:
        nodes.answer(respond(b'{"error":"boom"}', status=500))
        for _ in range(12):
            refused = await ask(entrance(api), lucid={"nodeIds": nodes.ids[:1]})
            assert refused.status_code == 502
        assert not await nodes.reasons()


async def test_retries_of_one_key_end_before_those_of_another(api: Api, entrance: Entrance) -> None:
    async with nodes_of(api, 2) as nodes:
        evil, victim = await keys_of(api, entrance, "evil", "evil")  # the same owner: budgets are of keys
        nodes.answer(respond(b'{"error":"boom"}', status=500))
        tried = [(await ask(evil)).headers["x-lucid-attempts"] for _ in range(12)]
        assert tried == ["2"] * 10 + ["1"] * 2
        assert (await ask(victim)).headers["x-lucid-attempts"] == "2"


# --- busy nodes

BUSY = {
    "429": refusal(429, "slow down", "Retry-After: 7"),
    "Ollama": refusal(503, "server busy, please try again.  maximum pending requests exceeded"),
    "llama.cpp, loading": refusal(503, "Loading model", type="unavailable_error", code=503),
    "vLLM, loading": respond(b"", "Retry-After: 7", status=503),
    "a date": refusal(503, "later", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT"),
    "text": respond(b"the queue is full", status=503, content_type="text/plain"),
    "SGLang": respond(b'{"error":{"message":"The server is draining."}}', status=503),
    "529": refusal(529, "Overloaded"),
}
AFTER = {"429": 7, "vLLM, loading": 7, "a date": 3600}


@pytest.mark.parametrize("count", [1, 3])
async def test_busy_nodes_are_at_capacity_and_nobody_failed(api: Api, entrance: Entrance, count: int) -> None:
    """The first request and the next are told alike: 503 with the node's Retry-After; no breaker, no error rate."""
    async with nodes_of(api, count) as nodes:
        for kind, answer in BUSY.items():
            nodes.answer(answer)
            for stream in (False, True):
                refused = await ask(entrance(api), stream=stream)
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (503, "MODEL_UNAVAILABLE"), (kind, refused.text)
                assert error["details"]["rejections"] == {"AT_CAPACITY": count}, kind
                assert AFTER.get(kind, 1) - 1 <= int(refused.headers["retry-after"]) <= AFTER.get(kind, 1)
            assert nodes.asked == count, kind
            nodes.become_free()
        for node_id in nodes.ids:
            assert not (await api.health(node_id))["errorRate"]


async def test_a_busy_upstream_is_at_capacity(api: Api) -> None:
    async with FaultNode() as upstream:
        await api.add_model("tiny", "api", upstream={"url": upstream.url})
        for kind, answer in BUSY.items():
            upstream.behaviour = Behaviour(answer=answer)
            refused = await ask(api)
            assert (refused.status_code, error_code(refused)) == (503, "MODEL_UNAVAILABLE"), kind
            assert refused.json()["error"]["details"]["rejections"] == {"AT_CAPACITY": 1}
            assert int(refused.headers["retry-after"]) == AFTER.get(kind, 1)


async def test_a_503_that_says_nothing_is_a_failure(api: Api, entrance: Entrance) -> None:
    page = respond(b"<html>503 Service Temporarily Unavailable</html>", status=503, content_type="text/html")
    async with nodes_of(api, 1) as nodes:
        for answer in (page, respond(b"", status=503), refusal(503, "no")):
            nodes.answer(answer)
            assert error_code(await ask(entrance(api))) == "NODE_FAILED"


async def test_a_busy_node_gives_way_to_another_one(api: Api, entrance: Entrance) -> None:
    async with nodes_of(api, 2) as nodes:
        nodes.answer(BUSY["Ollama"], chat_answer())
        for _ in range(3):
            assert (await ask(entrance(api))).status_code == 200


async def test_policies_that_a_client_invents_share_one_ranking(api: Api, entrance: Entrance) -> None:
    """Each new one would have every node looked at; all are told the same, the policy's reasons among it."""
    async with nodes_of(api, 2) as nodes:
        gateway, ranked = api.replica.gateway, []
        gateway.rejections_fresh_seconds = 60.0
        rank = gateway.rank

        def count(*arguments: Any) -> Any:
            ranked.append(arguments)
            return rank(*arguments)

        gateway.rank = count
        for number in range(MAX_RANKINGS * 3):
            refused = await ask(entrance(api), lucid={"allowRegions": [f"nowhere-{number}"]})
            error = refused.json()["error"]
            assert (refused.status_code, error["details"]["rejections"]) == (503, {"REGION_NOT_ALLOWED": 2})
        assert (len(ranked), nodes.asked) == (MAX_RANKINGS + 1, 0)


# --- drains while a request connects


@needs_sources
async def test_a_node_that_is_drained_while_it_is_connected_to_gets_nothing(api: Api) -> None:
    """The request goes to another node, and counts as no failure; without one it is told of the drain."""
    async with nodes_of(api, 2) as nodes:
        client = api.replica.gateway.context.client
        connect, drained = client.connect, asyncio.Event()

        async def connect_slowly(url: Any, *kind: Any, **more: Any) -> Any:
            """Drain the node after its connection was made, as a slow handshake would let it come about."""
            connection = await connect(url, *kind, **more)
            if not drained.is_set():
                drained.set()
                leaving = next(i for i, server in enumerate(nodes.servers) if server.port == url.port)
                assert (await api.http.post(f"/compute/drain/{nodes.ids[leaving]}")).status_code == 202
            return connection

        for server in nodes.servers:
            await server.hang_up()
        client.connect = connect_slowly  # type: ignore[method-assign]
        served = await ask(api)
        assert (served.status_code, served.headers["x-lucid-attempts"], nodes.asked) == (200, "2", 1)
        for server in nodes.servers:
            await server.hang_up()
        drained.clear()
        refused = await ask(api)
        assert (refused.status_code, nodes.asked) == (503, 1)
        assert refused.json()["error"]["details"]["rejections"] == {"DRAINING": 2}


def shun_no_longer(api: Api, preferred: str, other: str) -> None:
    """Let the next request go to the preferred node first."""
    stats = api.replica.gateway.context.stats
    for node_id, latency_ms in ((preferred, 1.0), (other, 500.0)):
        stats.nodes[node_id].shunned_until = 0.0
        stats.nodes[node_id].latencies = {
            kind: (latency_ms, stats.monotonic()) for kind in [*stats.nodes[node_id].latencies]
        }


async def ended_jobs(api: Api, count: int) -> list[dict[str, Any]]:
    """Return the newest jobs once so many have ended."""
    while True:
        jobs: list[dict[str, Any]] = (await api.http.get("/compute/jobs")).json()["jobs"]
        if sum(job["outcome"] != "running" for job in jobs) >= count:
            return jobs
        await asyncio.sleep(0.02)
