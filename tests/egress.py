"""For tests of the egress client: a client whose limits are enforced, an exchange with it, and both event loops."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import uvloop

from lucid_compute.egress.client import CLIENT_LIMITS, ClientLimits, HttpClient
from lucid_compute.egress.connection import RESPONSE_LIMITS, Deadlines, ResponseLimits
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.lookups import Resolver
from lucid_compute.egress.policy import EgressPolicy, ProviderUrl

LOOPBACK = EgressPolicy(allow_loopback=True)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: node\r\n"
ENFORCE_SECONDS = 0.01
TEST_SECONDS = 20.0


class Outcome(NamedTuple):
    """The outcome of an exchange; `fault` is None if it succeeded."""

    status: int
    body: bytes
    fault: FaultKind | None = None
    message: str = ""


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's own loop and on uvloop, as the service does; it fails if it hangs."""

    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **arguments: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(asyncio.wait_for(test(**arguments), TEST_SECONDS))

    new_loop = inspect.Parameter("new_loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(test)
    vars(run)["__signature__"] = signature.replace(parameters=[new_loop, *signature.parameters.values()])
    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    vars(run)["pytestmark"] = vars(test).get("pytestmark", [])
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    marked: Callable[..., None] = pytest.mark.parametrize("new_loop", loops, ids=["asyncio", "uvloop"])(run)
    return marked


@asynccontextmanager
async def open_client(
    policy: EgressPolicy = LOOPBACK,
    resolver: Resolver | None = None,
    *,
    limits: ClientLimits = CLIENT_LIMITS,
    response_limits: ResponseLimits = RESPONSE_LIMITS,
) -> AsyncIterator[HttpClient]:
    """Open a client, enforce its limits as the watchdog does but more often, and close it."""
    client = HttpClient(policy, resolver, limits=limits, response_limits=response_limits)

    async def enforce() -> None:
        while True:
            await asyncio.sleep(ENFORCE_SECONDS)
            client.enforce_limits()

    enforcing = asyncio.ensure_future(enforce())
    try:
        yield client
    finally:
        enforcing.cancel()
        await asyncio.wait([enforcing])
        client.close()
        await asyncio.sleep(ENFORCE_SECONDS)  # for the connections to close


async def ask(
    client: HttpClient,
    url: str | ProviderUrl,
    *,
    body: bytes = b"{}",
    wants_stream: bool = False,
    deadlines: Deadlines | None = None,
    head: bytes = HEAD,
) -> Outcome:
    """Send a request as the gateway does, and return what came back."""
    target = LOOPBACK.check_url(url) if isinstance(url, str) else url
    read = b""
    try:
        connection = client.acquire_idle(target) or await client.connect(target)
    except EgressFault as fault:
        return Outcome(0, b"", fault.kind, fault.message)
    try:
        connection.send(head, body, deadlines or Deadlines(), wants_stream=wants_stream)
        while part := await connection.receive():
            read += part
            if not connection.is_stream:
                break
    except EgressFault as fault:
        return Outcome(connection.status, read, fault.kind, fault.message)
    finally:
        client.release(target, connection)
    return Outcome(connection.status, read)
