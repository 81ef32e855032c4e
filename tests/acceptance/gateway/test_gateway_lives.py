"""Nodes, clients and keys that come to their end while requests run: killed, drained, gone, asleep, revoked."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.fault_answers import EVENTS, chat_stream, endless_body
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, Gateway, within
from tests.llama import Llama, llama_servers
from tests.lucid_serve import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"on "}}]}\n\n'
STREAM_TOKENS = 50
# A real server's stream of so many tokens takes a second and a half.
SLOWLY = Behaviour(drip_body_seconds=0.04, drip_bytes=300)
ENDLESS = Behaviour(answer=endless_body(EVENTS, EVENT), drip_body_seconds=0.02, drip_bytes=4096)
LEFT_SECONDS = 1.0
DRAIN_SECONDS = 1.0
REVOKED_SECONDS = 30.0
SLOW_READERS = 30
BUFFERED_BYTES = 256 * 1024  # with what a task and a connection weigh
SEEN_LATE_SECONDS = 0.3  # a client here sees its stream's end after the gateway has


class Run(NamedTuple):
    """One request of a load: when it was sent and answered, by whom, and what it said or raised."""

    sent_at: float
    ended_at: float
    node: str | None
    words: int
    error: openai.OpenAIError | None


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Llama]]:
    """Real servers: one to be killed, two to be left alive."""
    folder: Path = tmp_path_factory.mktemp("llamas")
    with llama_servers(folder, 3) as llamas:
        yield llamas


@asynccontextmanager
async def load(gateway: Gateway, model: str, clients: int, **body: Any) -> AsyncIterator[list[Run]]:
    """Let so many clients ask for one chat after another while the block runs; what they saw is put into the list."""
    runs: list[Run] = []
    is_over = asyncio.Event()

    async def ask() -> None:
        while not is_over.is_set():
            runs.append(await run_once(gateway, model, **body))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())
        try:
            yield runs
        finally:
            is_over.set()


async def run_once(gateway: Gateway, model: str, *, stream: bool, tokens: int) -> Run:
    """Ask for one chat of so many tokens."""
    sent_at, pieces = time.monotonic(), list[str]()
    node = error = None
    create = gateway.openai.chat.completions.with_raw_response.create
    try:
        raw = await create(model=model, messages=QUESTION, max_tokens=tokens, stream=stream)
        node = raw.headers["x-lucid-node"]
        answer: Any = raw.parse()
        if stream:
            async for chunk in answer:
                pieces += [choice.delta.content or "" for choice in chunk.choices]
        else:
            pieces.append(answer.choices[0].message.content)
    except openai.OpenAIError as raised:
        error = raised
    return Run(sent_at, time.monotonic(), node, len("".join(pieces).split()), error)


async def has_answered(node: str, runs: list[Run]) -> bool:
    """Return whether the node has served one of the runs."""
    return node in {run.node for run in runs}


@pytest.mark.usefixtures("retries")
async def test_a_server_killed_under_load_costs_no_client_an_answer(gateway: Gateway, llamas: list[Llama]) -> None:
    """Kill -9 of one of two real servers: every request whose first byte had not come is answered, and whole."""
    model = await gateway.add_model()
    killed, _ = [await gateway.add_node(llama.url, model) for llama in llamas[:2]]
    async with (
        load(gateway, model, 4, stream=False, tokens=200) as whole,
        load(gateway, model, 2, stream=True, tokens=200) as streams,
    ):
        await eventually(partial(has_answered, killed, whole), within(10))
        llamas[0].kill()
        killed_at = time.monotonic()
        await asyncio.sleep(1.0)
    assert not [run.error for run in whole if run.error]
    assert {run.words for run in whole} == {200}
    assert all(run.words == 200 for run in streams if not run.error)
    assert all(run.words > 0 for run in streams if run.error), "a stream that had not begun was lost"
    assert killed in {run.node for run in whole}
    assert not [run for run in (*whole, *streams) if run.sent_at > killed_at and run.node == killed]
    jobs = await gateway.jobs(model, 10)
    assert {job["outcome"] for job in jobs} <= {"completed", "failed"}
    query = {"model": model, "outcome": "failed", "perPage": "100"}  # of all, the newest hundred may be younger
    failed = (await gateway.admin.get("/compute/jobs", params=query)).json()["jobs"]
    assert {job["passportId"] for job in failed} == {killed}


async def test_a_drained_node_finishes_what_runs_and_begins_nothing(gateway: Gateway, llamas: list[Llama]) -> None:
    """Streams on it end whole; 1 s after the acknowledgement none begins; `drained` comes after the last has ended."""
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultNode(SLOWLY, upstream=each.url)) for each in llamas[1:]]
        model = await gateway.add_model()
        leaving, _ = [await gateway.add_node(proxy.url, model) for proxy in proxies]
        drained_at = math.inf
        async with load(gateway, model, 6, stream=True, tokens=STREAM_TOKENS) as runs:
            await proxies[0].until(lambda proxy: len(proxy.requests) > 1, within(2))
            await asyncio.sleep(0.3)
            acknowledged = (await gateway.admin.post(f"/compute/drain/{leaving}")).json()
            acknowledged_at = time.monotonic()
            assert (acknowledged["status"], acknowledged["drained"]) == ("draining", False)
            refused = await gateway.admin.post(f"/compute/deregister/{leaving}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "REQUESTS_IN_FLIGHT")
            assert refused.json()["error"]["details"]["inFlight"] >= 1
            while drained_at == math.inf:
                asked_at = time.monotonic()
                health = await gateway.health(leaving)
                assert (health["inFlight"] > 0) is not health["drained"]
                drained_at = asked_at if health["drained"] else math.inf
                assert time.monotonic() < acknowledged_at + within(5)
                await asyncio.sleep(0.02)
            await asyncio.sleep(DRAIN_SECONDS)
        on_it = [run for run in runs if run.node == leaving]
        assert not [run.error for run in runs if run.error]
        assert {run.words for run in runs} == {STREAM_TOKENS}
        assert [run for run in on_it if run.ended_at > acknowledged_at], "nothing ran when it was drained"
        assert all(run.sent_at <= acknowledged_at + DRAIN_SECONDS for run in on_it)
        assert max(run.ended_at for run in on_it) <= drained_at + SEEN_LATE_SECONDS
        assert {job["outcome"] for job in await gateway.jobs(model, len(runs))} == {"completed"}
        assert (await gateway.admin.post(f"/compute/deregister/{leaving}")).status_code == 200
        assert (await gateway.admin.get(f"/compute/health/{leaving}")).status_code == 410


@pytest.mark.parametrize("moment", ["in mid-stream", "before the first byte", "before a whole answer"])
async def test_a_client_that_leaves_frees_its_node(gateway: Gateway, moment: str) -> None:
    """The node's connection is closed within a second, nothing runs there any more, and the job is cancelled."""
    behaviour = ENDLESS if moment == "in mid-stream" else Behaviour(delay_seconds=math.inf)
    async with FaultNode(behaviour) as node, FaultNode() as spare:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        await gateway.add_node(spare.url, model, beat={"load": 1})
        body = {"model": model, "messages": QUESTION, "stream": moment != "before a whole answer"}
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5), gateway.raw.stream("POST", "/v1/chat/completions", json=body) as answer:
                parts = answer.aiter_bytes()  # held on to: when it is thrown away, it hangs up
                assert EVENT in await anext(parts)
                assert (await gateway.health(node_id))["inFlight"] == 1
        assert len(node.requests) == 1
        await node.until(lambda node: not node.open_connections, within(LEFT_SECONDS))
        await gateway.becomes_idle(node_id)
        (job,) = await gateway.jobs(model)
        assert (job["outcome"], job["reason"]) == ("cancelled", "client_left")
        assert bool(job["tokensOut"]) is (moment == "in mid-stream")
        assert not spare.requests


@pytest.mark.parametrize("header", ["", "Connection: close\r\n"], ids=["fast path", "by ASGI"])
async def test_a_client_that_does_not_read_is_cut(gateway: Gateway, header: str) -> None:
    """Then its node is free. Until then each holds little of this service's memory, whatever its node sends."""
    flood = Behaviour(answer=endless_body(EVENTS, EVENT * 200))
    async with FaultNode(flood) as node, AsyncExitStack() as stack:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        (worker,) = gateway.served.workers()
        before = resident_bytes(worker)
        began = time.monotonic()
        readers = [await stack.enter_async_context(a_sleeper(gateway, model, header)) for _ in range(SLOW_READERS)]
        await node.until(lambda node: len(node.requests) == SLOW_READERS, within(2))
        most = 0
        while (await gateway.health(node_id))["inFlight"]:
            most = max(most, resident_bytes(worker) - before)
            assert time.monotonic() - began < within(5)
            await asyncio.sleep(0.05)
        assert time.monotonic() - began > 1.5
        assert most < SLOW_READERS * BUFFERED_BYTES
        await node.until(lambda node: not node.open_connections, within(1))
        jobs = await gateway.jobs(model, SLOW_READERS)
        assert {(job["outcome"], job["reason"]) for job in jobs} == {("cancelled", "client_too_slow")}
        assert not (await the_end_of(readers[0])).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("header", ["", "Connection: close\r\n"], ids=["fast path", "by ASGI"])
async def test_a_client_that_pauses_gets_all_of_a_long_stream(gateway: Gateway, header: str) -> None:
    """It is longer than what the sockets on the way hold: the node waits too, and goes on when the client does."""
    texts = [f"{number} {'x' * 4000}" for number in range(2000)]
    async with FaultNode(Behaviour(answer=chat_stream(*texts))) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model)
        async with a_sleeper(gateway, model, header) as reader:
            await asyncio.sleep(0.7)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += await reader.read(1024 * 1024)
        assert received.count(b"data: {") == len(texts)
        assert all(f'"{number} x'.encode() in received for number in range(0, 2000, 100))
        (job,) = await gateway.jobs(model)
        assert (job["outcome"], job["tokensOut"]) == ("completed", len(texts))


async def test_a_revoked_keys_stream_ends_with_an_error(gateway: Gateway) -> None:
    """Within 30 s; new requests are refused at once; other keys' streams go on."""
    async with FaultNode(ENDLESS) as node:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        made = await gateway.new_key()
        other = await gateway.openai.chat.completions.create(model=model, messages=QUESTION, stream=True)
        async with gateway.openai_with(made["key"]) as client:
            stream = await client.chat.completions.create(model=model, messages=QUESTION, stream=True)
            await anext(stream)
            assert (await gateway.admin.delete(f"/keys/{made['id']}")).status_code == 204
            revoked_at = time.monotonic()
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
            with pytest.raises(openai.APIError) as ended:
                await asyncio.wait_for(read_on(stream), REVOKED_SECONDS)
            assert ended.value.code == "UNAUTHORIZED"
            assert time.monotonic() - revoked_at < REVOKED_SECONDS
        assert (await gateway.health(node_id))["inFlight"] == 1
        await anext(other)
        await other.close()
        await node.until(lambda node: not node.open_connections, within(LEFT_SECONDS))
        reasons = {job["reason"] for job in await gateway.jobs(model, 2)}
        assert reasons == {"key_revoked", "client_left"}


async def test_a_request_under_way_is_in_the_ledger_after_a_second(gateway: Gateway) -> None:
    """As running, with its node; how it ended takes that row's place."""
    ends_late = Behaviour(answer=chat_stream("a", "b"), drip_body_seconds=0.15, drip_bytes=20)
    async with FaultNode(ends_late) as node:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        asking = asyncio.create_task(gateway.chat(model, stream=True))
        outcomes = []
        while not asking.done():
            listed = (await gateway.admin.get("/compute/jobs", params={"model": model})).json()["jobs"]
            outcomes += [(job["outcome"], job["passportId"]) for job in listed]
            await asyncio.sleep(0.05)
        assert ("running", node_id) in outcomes
        assert [job["outcome"] for job in await gateway.jobs(model)] == ["completed"]
        assert (await asking).status_code == 200


async def read_on(stream: openai.AsyncStream[Any]) -> None:
    """Read a stream until it ends."""
    async for _ in stream:
        pass


@asynccontextmanager
async def a_sleeper(gateway: Gateway, model: str, header: str = "") -> AsyncIterator[asyncio.StreamReader]:
    """Ask for a stream on a connection of its own, and do not read."""
    host, port = gateway.served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = f'{{"model":"{model}","messages":[],"stream":true}}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {gateway.key}\r\n"
    writer.write(f"{head}{header}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    try:
        yield reader
    finally:
        writer.transport.abort()


async def the_end_of(reader: asyncio.StreamReader) -> bytes:
    """Return the last bytes of what came before the connection ended."""
    last = b""
    with suppress(ConnectionError):
        while part := await reader.read(64 * 1024):
            last = (last + part)[-100:]
    return last


def resident_bytes(pid: int) -> int:
    """Return how much memory a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
