"""Where the way out leads: only to addresses that were checked a moment ago, whatever DNS says the next moment."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any, Self

import pytest

from lucid_compute.egress.client import ClientLimits, HttpClient
from lucid_compute.egress.connection import Deadlines
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.lookups import (
    MAX_LOOKUPS_OF_OWNER,
    MAX_SLOW_NAMES,
    SLOW_NAME_SECONDS,
    Lookups,
    SystemResolver,
)
from lucid_compute.egress.policy import Address, EgressPolicy, ProviderUrl, parse_provider_url
from tests.egress import HEAD, LOOPBACK, Outcome, ask, on_both_loops, open_client
from tests.fault_answers import OK_BODY
from tests.fault_node import FaultNode

OK = Outcome(200, OK_BODY)
ALLOWED, DENIED = "127.0.0.1", "127.0.0.2"
REFUSED, LOOP, UNKNOWN = FaultKind.ADDRESS_REFUSED, FaultKind.ROUTING_LOOP, FaultKind.NAME_UNKNOWN


class Dns:
    """Answers each question with the next of `answers`, for ever; `asked` counts."""

    def __init__(self, *answers: Sequence[str] | Exception) -> None:
        self.answers = answers
        self.asked = 0

    async def __call__(self, *_: object) -> Sequence[str]:
        answer = self.answers[self.asked % len(self.answers)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class DenyingPolicy(EgressPolicy):
    """Denies one address of this machine: where both nodes can listen, the service's own policy allows all or none."""

    def check_address(self, address: Address, port: int) -> None:
        """Refuse `DENIED` too, and the IPv6 address that means the same."""
        if str(getattr(address, "ipv4_mapped", None) or address) == DENIED:
            raise ValueError(f"{DENIED} is denied.")
        super().check_address(address, port)


class TwoNodes:
    """A node at an allowed address and one at a denied address, on one port."""

    async def __aenter__(self) -> Self:
        """Start both."""
        self.allowed, self.denied = FaultNode(host=ALLOWED), FaultNode(host=DENIED)
        await self.allowed.start()
        self.denied.port = self.allowed.port
        await self.denied.start()
        self.policy = DenyingPolicy(allow_loopback=True)
        self.url = parse_provider_url(f"http://gpu.example:{self.allowed.port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop both."""
        await self.allowed.__aexit__()
        await self.denied.__aexit__()


@on_both_loops
async def test_a_name_that_leads_elsewhere_the_next_moment_is_connected_to_where_it_was_checked() -> None:
    for answers in ([[ALLOWED], [DENIED]], [[DENIED], [ALLOWED]], [[ALLOWED], [ALLOWED, DENIED]]):
        dns = Dns(*answers)
        async with TwoNodes() as nodes, open_client(nodes.policy, dns) as client:
            for turn in range(6):
                outcome = await ask(client, nodes.url)
                is_denied = DENIED in answers[turn % 2]
                assert (outcome.fault is REFUSED) if is_denied else (outcome == OK)
                client.close()  # so that the next request connects
            assert (dns.asked, nodes.allowed.connections, nodes.denied.connections) == (6, 3, 0)
            assert {request.headers["host"] for request in nodes.allowed.requests} == {"node"}


@on_both_loops
async def test_one_denied_address_among_allowed_ones_refuses_the_name() -> None:
    for answer in ([ALLOWED, DENIED], [DENIED, ALLOWED], [*["127.0.0.3"] * 40, DENIED], ["169.254.169.254", ALLOWED]):
        async with TwoNodes() as nodes, open_client(nodes.policy, Dns(answer)) as client:
            assert (await ask(client, nodes.url)).fault is REFUSED
            assert (nodes.allowed.connections, nodes.denied.connections) == (0, 0)


@on_both_loops
@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long"), [], ["no address"]]
)
async def test_a_name_without_an_address_is_unknown(error: Any) -> None:
    async with open_client(LOOPBACK, Dns(error)) as client:
        outcome = await ask(client, "http://gpu.example:8080")
        assert (outcome.fault, outcome.message) == (UNKNOWN, "gpu.example does not resolve.")


@on_both_loops
async def test_a_resolver_that_never_answers_is_not_waited_for() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    async with open_client(LOOPBACK, never, limits=ClientLimits(connect_seconds=0.1)) as client:
        assert (await ask(client, "http://gpu.example:8080")).fault is FaultKind.OUR_RESOLVER


@on_both_loops
@pytest.mark.parametrize("number", [socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY])
async def test_a_resolver_that_fails_is_ours(number: int) -> None:
    """Not the provider's, whose name may be right."""
    async with open_client(LOOPBACK, Dns(socket.gaierror(number, "no"))) as client:
        assert (await ask(client, "http://gpu.example:8080")).fault is FaultKind.OUR_RESOLVER


class Hanging:
    """Resolves names to this machine when it is told to, and `quick` ones at once; `asked` are those under way."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        if not host.startswith("quick"):
            await self.may_answer.wait()
        return [ALLOWED]


@on_both_loops
async def test_one_owners_names_hold_up_no_other_owners() -> None:
    """Four of them are looked up at a time; a fifth waits for one, and all that was kept of an owner is dropped."""
    dns = Hanging()
    lookups = Lookups(dns)
    own = [asyncio.ensure_future(lookups.addresses_of(f"slow-{n}", 80, "evil", 60)) for n in range(20)]
    while len(dns.asked) < MAX_LOOKUPS_OF_OWNER:  # noqa: ASYNC110 - other tasks ask
        await asyncio.sleep(0)
    assert await lookups.addresses_of("quick", 80, "victim", 60) == [ALLOWED]
    assert dns.asked == [*(f"slow-{n}" for n in range(MAX_LOOKUPS_OF_OWNER)), "quick"]
    waiting = asyncio.ensure_future(lookups.addresses_of("quick-2", 80, "evil", 60))
    await asyncio.sleep(0)
    assert "quick-2" not in dns.asked
    dns.may_answer.set()
    assert await waiting == [ALLOWED]
    assert len([await each for each in own]) == 20
    assert [*lookups._slots_of, *lookups._count_of, *lookups._running] == []


@on_both_loops
async def test_a_name_that_did_not_resolve_in_time_is_not_asked_for_half_a_minute() -> None:
    """Not even while its look-up still runs; when that ends well after all, the name is good again."""
    now, dns = [1000.0], Hanging()
    lookups = Lookups(dns, lambda: now[0])
    for _ in range(3):
        with pytest.raises(EgressFault, match="slow did not resolve in time"):
            await lookups.addresses_of("slow", 80, "evil", 0)
    assert dns.asked == ["slow"]
    now[0] += 30
    with pytest.raises(EgressFault):
        await lookups.addresses_of("slow", 80, "evil", 0)
    dns.may_answer.set()
    await asyncio.sleep(0.01)
    assert await lookups.addresses_of("slow", 80, "evil", 60) == [ALLOWED]
    dns.may_answer.clear()
    for number in range(MAX_SLOW_NAMES + 5):
        with pytest.raises(EgressFault):
            await lookups.addresses_of(f"slow-{number}", 80, str(number), 0)
    assert len(lookups._slow) == MAX_SLOW_NAMES


@on_both_loops
async def test_a_slow_name_whose_look_up_has_failed_is_asked_for_again_after_half_a_minute() -> None:
    now, answers = [1000.0], deque([asyncio.Event(), asyncio.Event()])
    answers[1].set()

    async def fail_then_answer(_host: str, _port: int) -> Sequence[str]:
        may_answer = answers.popleft()
        await may_answer.wait()
        if answers:
            raise socket.gaierror(socket.EAI_AGAIN, "late")
        return [ALLOWED]

    lookups, first = Lookups(fail_then_answer, lambda: now[0]), answers[0]
    with pytest.raises(EgressFault, match="in time"):
        await lookups.addresses_of("slow", 80, "evil", 0)
    first.set()
    await asyncio.sleep(0.01)
    now[0] += SLOW_NAME_SECONDS - 1
    with pytest.raises(EgressFault, match="in time"):
        await lookups.addresses_of("slow", 80, "evil", 60)
    now[0] += 1
    assert await lookups.addresses_of("slow", 80, "evil", 60) == [ALLOWED]


@on_both_loops
async def test_a_slow_name_whose_look_up_fails_in_the_end_stays_slow() -> None:
    """Otherwise each failure would let it hold a thread again at once."""
    asked, may_fail = list[str](), asyncio.Event()

    async def fail_late(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        await may_fail.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "no")

    lookups = Lookups(fail_late)
    for _ in range(2):
        with pytest.raises(EgressFault, match="did not resolve in time"):
            await lookups.addresses_of("slow", 80, "evil", 0)
        may_fail.set()
        while lookups._running:  # noqa: ASYNC110 - another task ends it
            await asyncio.sleep(0)
    assert asked == ["slow"]


@on_both_loops
async def test_the_systems_resolver_answers_each_address_once() -> None:
    resolve = SystemResolver()
    assert await resolve("127.0.0.1", 80) == ["127.0.0.1"]
    found = await resolve("localhost", 80)
    assert set(found) <= {"127.0.0.1", "::1"}
    assert len(found) == len(set(found)) > 0


@on_both_loops
async def test_a_name_whose_servers_never_answer_holds_up_one_thread_and_no_other_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    may_answer = threading.Event()
    getaddrinfo = socket.getaddrinfo

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        asked.append(host)
        if host == "slow.example":
            may_answer.wait(5)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return getaddrinfo("127.0.0.1", *arguments, **options)

    async with FaultNode() as node, open_client(limits=ClientLimits(connect_seconds=0.2)) as client:
        monkeypatch.setattr(socket, "getaddrinfo", slow)
        late = await asyncio.gather(*[ask(client, f"http://slow.example:{node.port}") for _ in range(100)])
        assert {outcome.message for outcome in late} == {"slow.example did not resolve in time."}
        assert await ask(client, f"http://gpu.example:{node.port}") == OK
        assert asked == ["slow.example", "gpu.example"]
        may_answer.set()
        assert (await ask(client, f"http://slow.example:{node.port}")).fault is FaultKind.OUR_RESOLVER


@on_both_loops
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS])
async def test_what_this_machine_lacks_is_not_the_providers_fault(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is told as ours, and idle connections make room."""
    async with FaultNode() as node, open_client() as client:
        assert await ask(client, node.url) == OK

        async def fail(*_: object, **__: object) -> None:
            raise OSError(number, "none left")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", fail)
        with pytest.raises(EgressFault) as refused:
            await client.connect(LOOPBACK.check_url(node.url))
        assert refused.value.kind is FaultKind.OUR_SOCKETS
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_the_faults_of_all_addresses_are_told() -> None:
    """With each address; a silent one does not hide what another said."""
    limits = ClientLimits(connect_seconds=0.4)
    async with (
        FaultNode(accepts=False) as silent,
        open_client(LOOPBACK, Dns(["127.0.0.3", ALLOWED]), limits=limits) as client,
    ):
        outcome = await ask(client, f"http://gpu.example:{silent.port}")
        assert outcome.fault is FaultKind.CONNECT_FAILED
        assert "127.0.0.3: gpu.example" in outcome.message
        assert "(Connection refused)" in outcome.message
        assert f"{ALLOWED}: gpu.example:{silent.port} did not answer the connection." in outcome.message


@on_both_loops
async def test_idle_connections_are_bounded_in_all() -> None:
    """The one that was idle longest is closed; each provider keeps what it used last."""
    async with FaultNode() as one, FaultNode() as two, open_client(limits=ClientLimits(max_idle=3)) as client:
        for node, count in ((one, 2), (two, 2)):
            url = LOOPBACK.check_url(node.url)
            for connection in [await client.connect(url) for _ in range(count)]:
                connection.send(HEAD, b"{}", Deadlines(), wants_stream=False)
                await connection.receive()
                client.release(url, connection)
        await one.until(lambda node: node.open_connections == 1)
        assert two.open_connections == 2
        assert await ask(client, one.url) == await ask(client, two.url) == OK
        assert (one.connections, two.connections) == (2, 2)
        assert sum(map(len, client._idle.values())) == len(client._idle_longest_first) == 3


@on_both_loops
async def test_ipv6_and_mapped_addresses_are_connected_to() -> None:
    async with FaultNode(host="::1") as node, open_client() as client:
        assert node.url.startswith("http://[::1]:")
        assert await ask(client, node.url) == OK
    async with FaultNode() as node, open_client(LOOPBACK, Dns(["::ffff:127.0.0.1"])) as client:
        for host in ("[::ffff:127.0.0.1]", "gpu.example"):
            assert await ask(client, f"http://{host}:{node.port}") == OK
    async with TwoNodes() as nodes, open_client(nodes.policy, Dns([f"::ffff:{DENIED}"])) as client:
        assert (await ask(client, nodes.url)).fault is REFUSED
        assert nodes.denied.connections == 0


@on_both_loops
async def test_localhost_means_loopback_without_asking_dns() -> None:
    dns = Dns([DENIED])
    async with FaultNode() as node, open_client(LOOPBACK, dns) as client:
        assert await ask(client, f"http://localhost:{node.port}") == OK
        assert dns.asked == 0


@on_both_loops
@pytest.mark.parametrize("own", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_what_leads_back_to_the_service_is_a_routing_loop(own: str) -> None:
    async with FaultNode() as node:
        for answer in (["127.0.0.1"], ["::ffff:127.0.0.1"], ["::ffff:7f00:1"], ["127.0.0.9", "127.0.0.1"]):
            async with open_client(LOOPBACK, Dns(answer)) as client:
                client.own_endpoints.add((own, node.port))
                for host in ("gpu.example", "localhost", "127.0.0.1", "[::ffff:127.0.0.1]"):
                    assert (await ask(client, f"http://{host}:{node.port}")).fault is LOOP
        assert node.connections == 0
        async with open_client() as client:
            client.own_endpoints.add((own, node.port + 1))
            assert await ask(client, node.url) == OK


@on_both_loops
async def test_an_address_that_does_not_answer_leaves_time_for_the_next() -> None:
    limits = ClientLimits(connect_seconds=1.0)
    async with FaultNode(accepts=False) as silent, FaultNode(host=DENIED) as node:
        await node.stop()
        node.port = silent.port
        await node.start()
        began_at = time.monotonic()
        async with open_client(LOOPBACK, Dns(["127.0.0.3", ALLOWED, DENIED]), limits=limits) as client:
            assert await ask(client, f"http://gpu.example:{silent.port}") == OK
            assert time.monotonic() - began_at > 0.4
        async with open_client(LOOPBACK, Dns([ALLOWED]), limits=limits) as client:
            assert (await ask(client, f"http://gpu.example:{silent.port}")).fault is FaultKind.CONNECT_FAILED
            assert 1.4 < time.monotonic() - began_at < 3


@on_both_loops
async def test_a_closed_port_is_a_failed_connect_and_nothing_is_left_of_it() -> None:
    async with FaultNode() as node:
        await node.stop()
        async with open_client() as client:
            assert (await ask(client, node.url)).fault is FaultKind.CONNECT_FAILED
            await node.start()
            assert await ask(client, node.url) == OK


@on_both_loops
async def test_a_failed_connect_is_let_go_without_the_garbage_collector() -> None:
    class Body(bytearray):
        """Can be referred to weakly."""

    async def fail(client: HttpClient, url: ProviderUrl) -> weakref.ref[Body]:
        body = Body(1000)
        with contextlib.suppress(EgressFault):
            await client.connect(url)
        return weakref.ref(body)

    async with FaultNode() as node, open_client(LOOPBACK, Dns([ALLOWED, "127.0.0.3"])) as client:
        await node.stop()
        gc.collect()
        gc.disable()
        try:
            body = await fail(client, LOOPBACK.check_url(f"http://gpu.example:{node.port}"))
            await asyncio.sleep(0)
            assert body() is None
        finally:
            gc.enable()


@on_both_loops
@pytest.mark.parametrize("has_gone", [False, True])
async def test_a_connection_that_ends_up_elsewhere_is_not_used(
    monkeypatch: pytest.MonkeyPatch, *, has_gone: bool
) -> None:
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def astray(factory: Any, host: str, port: int, **_: object) -> tuple[Any, Any]:
        transport, protocol = await connect(factory, DENIED, port)
        if has_gone:
            return Gone(), protocol
        return transport, protocol

    class Gone(asyncio.Transport):
        """Has no peer any more."""

    async with TwoNodes() as nodes, open_client(LOOPBACK, Dns([ALLOWED])) as client:
        monkeypatch.setattr(loop, "create_connection", astray)
        outcome = await ask(client, nodes.url)
        assert outcome.fault is (FaultKind.CONNECT_FAILED if has_gone else REFUSED)
        await nodes.denied.until(lambda node: node.connections == 1 and not node.open_connections)
        assert not nodes.denied.requests


def recording(reached: list[str]) -> Callable[..., Any]:
    """Stand in for the loop's `create_connection`: note the address, connect to nothing."""

    async def create_connection(factory: object, host: str, port: int, **options: object) -> None:
        reached.append(host)
        raise ConnectionRefusedError(111, "recorded")

    return create_connection


async def test_no_url_and_no_name_leads_to_a_denied_address(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors: Any = importlib.import_module("tests.unit.egress.test_egress_policy")
    denied = [*vectors.CLOSED, *vectors.NEVER.split(), *vectors.carriers("10.0.0.1", "127.0.0.1", *vectors.NEVER_IPV4)]
    denied += vectors.mapped(denied)
    public = [*vectors.OUTSIDE, *vectors.mapped(vectors.OUTSIDE)]
    texts = [url for url, _ in vectors.SPELLINGS] + [url for _, url in vectors.pairs(vectors.REJECTED, "http://")]
    texts += [place.format(control) for control in vectors.CONTROLS for place in vectors.PLACES.split()]
    texts += [f"http://{host}:8080" for host in (*vectors.LOOPBACK.split(), *vectors.numeric_spellings("127.0.0.1"))]
    texts += [f"http://[{address}]:8080" if ":" in address else f"http://{address}:8080" for address in denied]
    assert len(texts) >= 500

    reached: list[str] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", recording(reached))

    async def connect(text: str, *answers: list[str]) -> None:
        try:
            await HttpClient(EgressPolicy(), Dns(*answers)).connect(parse_provider_url(text))
        except (ValueError, EgressFault):
            return
        pytest.fail(f"{text} was connected to")

    for text in texts:
        await connect(text, ["169.254.169.254"])
        await connect(text, ["8.8.8.8", "127.0.0.1"])
    for address in denied:
        await connect("http://gpu.example", [address])
        await connect("http://gpu.example", ["8.8.8.8", address])
    assert set(reached) == {"2001:4860::abcd"}  # the one public address that stands in a URL
    for address in public:
        reached.clear()
        await connect("http://gpu.example", [address], ["127.0.0.1"])
        assert [ip_address(host) for host in reached] == [ip_address(address)]
    reached.clear()
    await connect("http://gpu.example", [f"8.8.8.{number}" for number in range(40)])
    assert reached == ["8.8.8.0", "8.8.8.1", "8.8.8.2", "8.8.8.3"]
