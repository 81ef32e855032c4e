"""Two gateways on one database: they share a node's places, heed each other's drains, and forget one that died."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import pytest_asyncio

from tests import postgres
from tests.fault_answers import EVENTS, Answer, endless_body
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, Gateway, chat_answer, open_gateway, within
from tests.lucid_serve import Served, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLACES = 4
CLIENTS = 8  # of each gateway
DRAIN_SECONDS = 1.0
FORGOTTEN_SECONDS = 15.0
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"on "}}]}\n\n'


@pytest.fixture(scope="module")
def pair(postgres_and_template: tuple[str, str]) -> Iterator[tuple[Served, Served]]:
    """Two services on one database; a test may kill the second one."""
    url = asyncio.run(postgres.clone(*postgres_and_template))
    with serving(url) as first, serving(url) as second:
        yield first, second
    asyncio.run(postgres.drop(url))


@pytest_asyncio.fixture(loop_scope="module")
async def one(pair: tuple[Served, Served]) -> AsyncIterator[Gateway]:
    """The first one."""
    async with open_gateway(pair[0]) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def other(pair: tuple[Served, Served]) -> AsyncIterator[Gateway]:
    """The second one, started anew if it was killed."""
    if not pair[1].is_running:
        pair[1].start()
        pair[1].wait_until_ready()
    async with open_gateway(pair[1]) as gateway:
        yield gateway


class Crowd:
    """What runs on a node now, and the most that ever did; `end` ends it."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self._ends = asyncio.Semaphore(0)

    def answer(self) -> Answer:
        """Return a chat that lasts until `end` is called."""
        whole = chat_answer()
        assert isinstance(whole.body, bytes)
        said = whole.body

        async def body() -> AsyncIterator[bytes]:
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self._ends.acquire()
                yield said
            finally:
                self.running -= 1

        return whole._replace(body=body)

    def end(self, count: int) -> None:
        """Let so many chats end."""
        for _ in range(count):
            self._ends.release()


async def _chat_when_there_is_room(gateway: Gateway, model: str) -> httpx.Response:
    """Return the response to a chat. The other gateway's news that its chats have ended may still be under way."""
    while (answer := await gateway.chat(model)).status_code == httpx.codes.SERVICE_UNAVAILABLE:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return answer


async def test_two_gateways_do_not_overfill_a_node(one: Gateway, other: Gateway) -> None:
    """Each counts what the other runs there: a node that one has filled gets nothing from both, and then again."""
    crowd = Crowd()
    async with FaultNode(Behaviour(answer=crowd.answer())) as node:
        model = await one.add_model()
        await one.add_node(node.url, model, maxConcurrency=PLACES)
        for filling, watching in ((one, other), (other, one), (one, other)):
            for each in (filling, watching):
                await each.comes_to(model, lambda matched: len(matched["shortlist"]) == 1)
            chats = [asyncio.create_task(_chat_when_there_is_room(filling, model)) for _ in range(PLACES)]
            await node.until(lambda _: crowd.running == PLACES, seconds=30)
            await watching.comes_to(model, lambda matched: not matched["shortlist"])
            for answer in await asyncio.gather(*(each.chat(model) for each in (one, other) for _ in range(CLIENTS))):
                assert answer.status_code != 200
                assert answer.json()["error"]["details"].get("rejections") == {"AT_CAPACITY": 1}, answer.text
            assert crowd.running == PLACES
            crowd.end(PLACES)
            assert [(await chat).status_code for chat in chats] == [200] * PLACES
        assert crowd.most == PLACES


async def test_a_drain_through_one_stops_the_others_routing(one: Gateway, other: Gateway) -> None:
    """Within a second of the acknowledgement the other one sends the node nothing more, and then it is drained."""
    slow = Behaviour(answer=chat_answer(), delay_seconds=0.1)
    async with FaultNode(slow) as leaving, FaultNode(slow) as staying:
        model = await one.add_model()
        leaving_id = await one.add_node(leaving.url, model)
        await one.add_node(staying.url, model)
        await other.comes_to(model, lambda matched: len(matched["shortlist"]) == 2)
        sent: list[tuple[float, str]] = []
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                at = time.monotonic()
                answer = await other.chat(model)
                assert answer.status_code == 200, answer.text
                sent.append((at, answer.headers["x-lucid-node"]))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(ask())
            await leaving.until(lambda node: len(node.requests) > 2, within(2))
            assert (await one.admin.post(f"/compute/drain/{leaving_id}")).status_code == 202
            acknowledged_at = time.monotonic()

            async def is_drained() -> bool:
                return bool((await one.health(leaving_id))["drained"])

            await eventually(is_drained, within(2))
            at_last = len(leaving.requests)
            await asyncio.sleep(DRAIN_SECONDS)
            is_over.set()
        assert len(leaving.requests) == at_last, "a request began on a node that was drained"
        assert max(at for at, node in sent if node == leaving_id) <= acknowledged_at + DRAIN_SECONDS
        assert any(node != leaving_id for at, node in sent if at > acknowledged_at + DRAIN_SECONDS / 2)


async def test_what_a_killed_replica_ran_is_forgotten(
    pair: tuple[Served, Served], one: Gateway, other: Gateway
) -> None:
    """Its requests count on the node while it lives, and 15 s longer at the most."""
    endless = Behaviour(answer=endless_body(EVENTS, EVENT), drip_body_seconds=0.05, drip_bytes=4096)
    async with FaultNode(endless) as node:
        model = await one.add_model()
        node_id = await one.add_node(node.url, model)
        await other.comes_to(model, lambda matched: len(matched["shortlist"]) == 1)
        body = json.dumps({"model": model, "messages": QUESTION, "stream": True})
        async with other.raw.stream("POST", "/v1/chat/completions", content=body) as answer:
            assert answer.status_code == 200

            async def is_counted() -> bool:
                return bool((await one.health(node_id))["inFlight"] == 1)

            async def is_entered() -> bool:
                listed = await one.admin.get("/compute/jobs", params={"model": model, "outcome": "running"})
                return len(listed.json()["jobs"]) == 1

            await eventually(is_counted, within(2))
            await eventually(is_entered, within(2))
            pair[1].kill()
            killed_at = time.monotonic()
            await node.until(lambda node: not node.open_connections, within(1))
            await one.becomes_idle(node_id, FORGOTTEN_SECONDS)
            assert time.monotonic() - killed_at <= FORGOTTEN_SECONDS
