"""Exchanges with providers over real sockets: whatever they do, they cost bounded time, memory and connections."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lucid_compute.egress.client import ClientLimits
from lucid_compute.egress.connection import (
    MAX_BUFFERED_BYTES,
    MAX_HEAD_BYTES,
    READ_BYTES,
    RESPONSE_LIMITS,
    Deadlines,
    ResponseLimits,
)
from lucid_compute.egress.faults import FaultKind
from tests.egress import HEAD, LOOPBACK, Outcome, ask, on_both_loops, open_client
from tests.fault_answers import (
    EVENTS,
    OK_BODY,
    SURPLUS,
    Answer,
    chat_stream,
    endless_body,
    endless_header,
    endless_headers,
    endless_trailer,
    gzip_bomb,
    redirect,
    respond,
    respond_in_chunks,
    respond_until_close,
)
from tests.fault_node import Behaviour, Ending, FaultNode

OK = Outcome(200, OK_BODY)
RAW_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(OK_BODY), OK_BODY)
EVIL = RAW_OK.replace(b"true", b"evil")
LOST, BAD = FaultKind.CONNECTION_LOST, FaultKind.BAD_RESPONSE


@on_both_loops
async def test_requests_share_a_connection_while_the_node_keeps_it() -> None:
    async with FaultNode() as node, open_client() as client:
        assert [await ask(client, node.url, body=b"%d" % number) for number in range(3)] == [OK] * 3
        assert node.connections == node.open_connections == 1
        assert [request.body for request in node.requests] == [b"0", b"1", b"2"]
        assert node.requests[0].head == HEAD + b"Content-Length: 1\r\n\r\n"
        assert await asyncio.gather(*[ask(client, node.url) for _ in range(3)]) == [OK] * 3
        assert node.connections == 3
        assert {request.connection for request in node.requests} == {1, 2, 3}
    assert node.open_connections == 0


@on_both_loops
@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(answer=respond(OK_BODY, "Connection: close")),
        Behaviour(answer=Answer(RAW_OK.replace(b"1.1", b"1.0"))),
        Behaviour(answer=respond_until_close(OK_BODY), ending=Ending.CLOSE),
        Behaviour(idle_seconds=0.3),
        Behaviour(surplus=EVIL, surplus_after_seconds=0.1),
        Behaviour(surplus=b"H", surplus_after_seconds=0.1),
    ],
)
async def test_a_connection_that_ends_or_says_too_much_is_not_used_again(behaviour: Behaviour) -> None:
    async with FaultNode(behaviour) as node, open_client() as client:
        for number in (1, 2, 3):
            assert await ask(client, node.url) == OK
            await node.until(lambda node: not node.open_connections)
            assert node.connections == number


@on_both_loops
async def test_what_a_node_adds_to_one_answer_never_reaches_another_request() -> None:
    async with FaultNode() as node, open_client() as client:
        for name, data in SURPLUS.items():
            node.script.append(Behaviour(answer=Answer(data)))
            first = await ask(client, node.url)
            assert first.fault in {None, BAD}, name
            assert first.body in {b"", b"{}"}, name
            assert await ask(client, node.url) == OK, name
        assert node.connections > len(SURPLUS)


@on_both_loops
async def test_connections_are_bounded_in_age_idle_time_and_number() -> None:
    async with FaultNode() as node:
        async with open_client(limits=ClientLimits(max_age_seconds=0.1)) as client:
            await ask(client, node.url)
            await asyncio.sleep(0.11)
            await ask(client, node.url)
            await node.until(lambda node: (node.connections, node.open_connections) == (2, 1))
        async with open_client(limits=ClientLimits(max_idle_seconds=0.1)) as client:
            assert await ask(client, node.url) == OK
            await node.until(lambda node: (node.connections, node.open_connections) == (3, 0))
        async with open_client(limits=ClientLimits(max_idle_per_origin=2)) as client:
            assert await asyncio.gather(*[ask(client, node.url) for _ in range(5)]) == [OK] * 5
            await node.until(lambda node: (node.connections, node.open_connections) == (8, 2))


@on_both_loops
async def test_a_connection_that_is_given_back_twice_is_lent_to_one_request() -> None:
    async with FaultNode() as node, open_client() as client:
        url = LOOPBACK.check_url(node.url)
        assert await ask(client, url) == OK
        connection = client.acquire_idle(url)
        assert connection is not None
        client.release(url, connection)
        client.release(url, connection)
        assert [client.acquire_idle(url), client.acquire_idle(url)] == [connection, None]


ENDLESS = {
    "a header": endless_header(),
    "headers": endless_headers(),
    "a body": endless_body(),
    "a body without length": respond_until_close(endless_body().body),
    "a trailer": endless_trailer(),
    "zeros, compressed": gzip_bomb(4),
}


@on_both_loops
@pytest.mark.parametrize("name", [*ENDLESS])
async def test_an_answer_without_end_is_cut_at_its_limit(name: str) -> None:
    limits = ResponseLimits(max_body_bytes=1024 * 1024)
    async with FaultNode(Behaviour(answer=ENDLESS[name])) as node, open_client(response_limits=limits) as client:
        assert (await ask(client, node.url)).fault is (FaultKind.TOO_LARGE if "body" in name else BAD)
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_a_head_of_32_kib_an_answer_of_32_mib_and_a_long_stream_are_read() -> None:
    limits = ResponseLimits(max_body_bytes=1024 * 1024)
    async with FaultNode() as node, open_client() as client, open_client(response_limits=limits) as bounded:
        node.behaviour = Behaviour(answer=respond(b"{}", "X: " + "a" * (MAX_HEAD_BYTES - 200)))
        assert await ask(client, node.url) == Outcome(200, b"{}")
        node.behaviour = Behaviour(answer=respond(b" " * RESPONSE_LIMITS.max_body_bytes))
        assert len((await ask(client, node.url)).body) == RESPONSE_LIMITS.max_body_bytes
        node.behaviour = Behaviour(answer=respond_in_chunks(*[b" " * 40_000] * 90))
        assert len((await ask(bounded, node.url, wants_stream=True)).body) == 3_600_000
        assert node.connections == 2


FIRST, WHOLE = FaultKind.FIRST_BYTE_TIMEOUT, FaultKind.ANSWER_TIMEOUT
IDLE, TOTAL = FaultKind.IDLE_TIMEOUT, FaultKind.TOTAL_TIMEOUT
LATE = {  # what the node does, whether a stream is asked for, the deadline and the fault
    "says nothing": (Behaviour(delay_seconds=math.inf), False, {"answer_seconds": 0.2}, WHOLE),
    "says nothing of a stream": (Behaviour(delay_seconds=math.inf), True, {"first_byte_seconds": 0.2}, FIRST),
    "drips its head": (Behaviour(drip_head_seconds=0.01), True, {"first_byte_seconds": 0.2}, FIRST),
    "drips its answer": (Behaviour(drip_body_seconds=0.05), False, {"answer_seconds": 0.2}, WHOLE),
    "stops in its head": (Behaviour(cut_head_after=20), True, {"first_byte_seconds": 0.2}, FIRST),
    "falls silent": (Behaviour(cut_body_after=20), True, {"between_seconds": 0.2}, IDLE),
    "drips its stream": (Behaviour(drip_body_seconds=0.01), True, {"total_seconds": 0.3}, TOTAL),
}


@on_both_loops
@pytest.mark.parametrize("name", [*LATE])
async def test_a_node_that_is_late_is_given_up_at_its_deadline(name: str) -> None:
    behaviour, wants_stream, limit, fault = LATE[name]
    answer = chat_stream("a", "b") if wants_stream else respond()
    async with FaultNode(replace(behaviour, answer=answer)) as node, open_client() as client:
        began_at = time.monotonic()
        deadlines = Deadlines(**limit)
        assert (await ask(client, node.url, wants_stream=wants_stream, deadlines=deadlines)).fault is fault
        assert min(limit.values()) <= time.monotonic() - began_at < min(limit.values()) + 1
        await node.until(lambda node: not node.open_connections)


BREAKS = {
    "before its head": Behaviour(cut_head_after=0),
    "in its head": Behaviour(cut_head_after=20),
    "in its answer": Behaviour(cut_body_after=5),
    "in its chunks": Behaviour(cut_body_after=20, answer=chat_stream("a")),
    "before its last chunk": Behaviour(answer=respond_in_chunks(b"data: a\n\n", ends=False)),
}


@on_both_loops
@pytest.mark.parametrize("ending", [Ending.CLOSE, Ending.RESET])
@pytest.mark.parametrize("name", [*BREAKS])
async def test_a_node_that_dies_is_noticed_at_once(name: str, ending: Ending) -> None:
    async with FaultNode() as node, open_client() as client:
        for wants_stream in (False, True):
            node.behaviour = replace(BREAKS[name], ending=ending)
            async with asyncio.timeout(1):
                assert (await ask(client, node.url, wants_stream=wants_stream)).fault is LOST
            assert node.open_connections == 0


@on_both_loops
async def test_an_answer_up_to_the_end_of_its_connection_is_whole_unless_that_was_reset() -> None:
    async with FaultNode() as node, open_client() as client:
        for ending, fault in ((Ending.CLOSE, None), (Ending.RESET, LOST)):
            node.behaviour = Behaviour(answer=respond_until_close(b"{}"), surplus_after_seconds=0.05, ending=ending)
            assert (await ask(client, node.url)).fault == fault
        node.behaviour = Behaviour(answer=respond_until_close(b"{}"))
        asking = asyncio.ensure_future(ask(client, node.url))
        await node.until(lambda node: len(node.requests) == 3)
        await asyncio.sleep(0.02)
        client.close()
        assert (await asking).fault is LOST


@on_both_loops
async def test_a_slow_reader_holds_the_node_back_with_little_in_memory() -> None:
    async with FaultNode(Behaviour(answer=endless_body(EVENTS))) as node, open_client() as client:
        url = LOOPBACK.check_url(node.url)
        connection = await client.connect(url)
        connection.send(HEAD, b"{}", Deadlines(between_seconds=0.2), wants_stream=True)
        for _ in range(2):
            await asyncio.sleep(0.3)  # longer than the node may be silent, which it is not: we do not listen
            assert MAX_BUFFERED_BYTES < connection._buffered <= MAX_BUFFERED_BYTES + READ_BYTES
            assert len(await connection.receive()) <= MAX_BUFFERED_BYTES + READ_BYTES
        read = 0
        while read < 8 * 1024 * 1024:
            read += len(await connection.receive())
        client.release(url, connection)
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_no_redirect_is_followed() -> None:
    async with FaultNode() as elsewhere, FaultNode() as node, open_client() as client:
        for status in (301, 302, 303, 307, 308):
            node.behaviour = Behaviour(answer=redirect(f"{elsewhere.url}/v1", status))
            assert (await ask(client, node.url)).status == status
        assert elsewhere.connections == 0


@on_both_loops
async def test_proxies_and_netrc_of_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    async with FaultNode() as proxy, FaultNode() as node:
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with open_client() as client:
            assert await ask(client, node.url) == OK
        assert proxy.connections == 0
        assert node.requests[0].head == HEAD + b"Content-Length: 2\r\n\r\n"


@on_both_loops
async def test_a_request_that_is_given_up_frees_its_connection() -> None:
    async with FaultNode(Behaviour(delay_seconds=math.inf)) as node, open_client() as client:
        asking = [asyncio.ensure_future(ask(client, node.url)) for _ in range(20)]
        await node.until(lambda node: len(node.requests) == 20)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        await node.until(lambda node: not node.open_connections)
        assert not client._busy
