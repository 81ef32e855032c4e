"""TLS on the way out: who can't prove the name that was asked for is not spoken to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from lucid_compute.egress.client import ClientLimits
from lucid_compute.egress.connection import MAX_BUFFERED_BYTES, READ_BYTES, Deadlines
from lucid_compute.egress.faults import FaultKind
from tests.authority import Authority
from tests.egress import HEAD, LOOPBACK, Outcome, ask, on_both_loops, open_client
from tests.fault_answers import EVENTS, OK_BODY, Answer, endless_body, respond, respond_in_chunks
from tests.fault_node import Behaviour, Ending, FaultNode

OK = Outcome(200, OK_BODY)
NAME = "gpu.example"


async def to_loopback(_: str, __: int) -> Sequence[str]:
    """Resolve every name to the node under test."""
    return ["127.0.0.1"]


@on_both_loops
async def test_a_node_that_proves_its_name_is_asked_for_it_and_answers_over_tls(authority: Authority) -> None:
    asked: list[str | None] = []
    tls = authority.issue(f"DNS:{NAME}", "IP:127.0.0.1")
    tls.sni_callback = lambda _, name, __: asked.append(name)
    async with FaultNode(tls=tls) as node, open_client(LOOPBACK, to_loopback) as client:
        for _ in range(3):
            assert await ask(client, f"https://{NAME}:{node.port}") == OK
        assert (asked, node.connections) == ([NAME], 1)
        assert await ask(client, node.url) == OK  # by its address, which the certificate names too
        assert (asked, node.connections) == ([NAME, None], 2)


@on_both_loops
@pytest.mark.parametrize(
    "names", [("DNS:other.example",), ("DNS:*.example.com",), ("DNS:127.0.0.1",), ("IP:127.0.0.2",)]
)
async def test_a_node_with_the_certificate_of_another_is_refused(authority: Authority, names: tuple[str, ...]) -> None:
    async with FaultNode(tls=authority.issue(*names)) as node, open_client(LOOPBACK, to_loopback) as client:
        for host in (NAME, "127.0.0.1"):
            outcome = await ask(client, f"https://{host}:{node.port}")
            assert outcome.fault is FaultKind.TLS_FAILED
            assert "mismatch" in outcome.message
        assert not node.requests
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_a_certificate_that_nobody_trusted_signed_is_refused(authority: Authority) -> None:
    tls = authority.issue(f"DNS:{NAME}", is_signed=False)
    async with FaultNode(tls=tls) as node, open_client(LOOPBACK, to_loopback) as client:
        outcome = await ask(client, f"https://{NAME}:{node.port}")
        assert outcome.fault is FaultKind.TLS_FAILED
        assert "self-signed" in outcome.message.replace("self signed", "self-signed")
        assert not node.requests


@on_both_loops
async def test_a_node_that_speaks_no_tls_is_refused() -> None:
    for behaviour in (
        Behaviour(greeting=b"HTTP/1.1 400 No TLS\r\n\r\n"),
        Behaviour(greeting=b"SSH-2.0-OpenSSH_9.9\r\n"),
    ):
        async with FaultNode(behaviour) as node, open_client() as client:
            assert (await ask(client, f"https://127.0.0.1:{node.port}")).fault is FaultKind.TLS_FAILED


@on_both_loops
async def test_a_tls_handshake_that_never_ends_is_cut() -> None:
    async with FaultNode() as node, open_client(limits=ClientLimits(tls_seconds=0.2)) as client:
        began_at = time.monotonic()
        outcome = await ask(client, f"https://127.0.0.1:{node.port}")
        assert (outcome.fault, "TLS" in outcome.message) == (FaultKind.TLS_FAILED, True)
        assert 0.2 <= time.monotonic() - began_at < 1.2
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_answers_over_tls_keep_to_the_same_rules(authority: Authority) -> None:
    tls = authority.issue("IP:127.0.0.1")
    async with FaultNode(tls=tls) as node, open_client() as client:
        node.behaviour = Behaviour(answer=respond(b" " * 3_000_000))
        assert len((await ask(client, node.url)).body) == 3_000_000
        node.behaviour = Behaviour(answer=respond_in_chunks(*[b" " * 100_000] * 30))
        assert len((await ask(client, node.url, wants_stream=True)).body) == 3_000_000
        assert node.connections == 1
        node.behaviour = Behaviour(answer=Answer(b"garbage"))
        assert (await ask(client, node.url)).fault is FaultKind.BAD_RESPONSE
        node.behaviour = Behaviour(cut_body_after=3, ending=Ending.CLOSE)
        assert (await ask(client, node.url)).fault is FaultKind.CONNECTION_LOST
        node.behaviour = Behaviour(surplus=b"H", surplus_after_seconds=0.2)
        assert await ask(client, node.url) == OK
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_a_slow_reader_holds_the_node_back_over_tls_too(authority: Authority) -> None:
    tls = authority.issue("IP:127.0.0.1")
    async with FaultNode(Behaviour(answer=endless_body(EVENTS)), tls=tls) as node, open_client() as client:
        url = LOOPBACK.check_url(node.url)
        connection = await client.connect(url)
        connection.send(HEAD, b"{}", Deadlines(), wants_stream=True)
        await asyncio.sleep(0.3)
        assert MAX_BUFFERED_BYTES < connection._buffered <= MAX_BUFFERED_BYTES + READ_BYTES
        read = 0
        while read < 4 * 1024 * 1024:
            read += len(await connection.receive())
        client.release(url, connection)
        await node.until(lambda node: not node.open_connections)
