"""What HttpProtocol takes from uvicorn, name by name: when one is gone or means something else, this says which."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from inspect import signature
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lucid_compute.server.http_protocol import ABORT, HttpProtocol

OVERRIDDEN = {
    "connection_made": ["self", "transport"],
    "connection_lost": ["self", "exc"],
    "data_received": ["self", "data"],
    "on_message_begin": ["self"],
    "on_response_complete": ["self"],
    "timeout_keep_alive_handler": ["self"],
    "send_400_response": ["self", "msg"],
}
HALF_A_REQUEST = b"POST / HTTP/1.1\r\nHost: lucid\r\nContent-Length: 2\r\n\r\na"


class Transport(asyncio.Transport):
    """Takes everything, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Stay open."""

    def pause_reading(self) -> None:
        """Read on."""

    resume_reading = pause_reading

    def abort(self) -> None:
        self.is_aborted = True


def has_cycle(protocol: HttpToolsProtocol) -> bool:
    """Return whether there is one; uvicorn's types deny that it can be missing."""
    return protocol.cycle is not None


async def answer_ok(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Wait for the whole body, then answer."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


@pytest.fixture
async def config() -> AsyncIterator[uvicorn.Config]:
    """The configuration of a server that answers everything."""
    config = uvicorn.Config(answer_ok, http=HttpProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    yield config
    await asyncio.sleep(0)  # what was started ends


@pytest.mark.parametrize(("name", "parameters"), OVERRIDDEN.items(), ids=str)
def test_uvicorn_still_calls_what_is_overridden(name: str, parameters: list[str]) -> None:
    """The methods exist under these names, with these parameters."""
    method = getattr(HttpToolsProtocol, name, None)
    assert method is not None, f"uvicorn's HttpToolsProtocol has no {name} any more: HttpProtocol overrides nothing"
    assert list(signature(method).parameters) == parameters


async def test_uvicorn_still_has_the_attributes_that_are_read(config: uvicorn.Config) -> None:
    """They say of half a request what HttpProtocol understands by them."""
    protocol, transport = HttpToolsProtocol(config, ServerState(), {}), Transport()
    protocol.connection_made(transport)
    assert not has_cycle(protocol), "there is no cycle before the first headers are whole"
    protocol.data_received(HALF_A_REQUEST[:20])
    assert not has_cycle(protocol), "nor in the midst of them"
    protocol.data_received(HALF_A_REQUEST[20:])
    cycle = protocol.cycle
    assert isinstance(cycle, RequestResponseCycle)
    assert cycle.scope is protocol.scope, "the scope is the cycle's once the headers are whole"
    assert "extensions" not in protocol.scope, "uvicorn has extensions of its own: add to them"
    assert (bytes(cycle.body), cycle.more_body) == (b"a", True)
    assert (cycle.response_started, cycle.response_complete, cycle.disconnected) == (False, False, False)
    assert cycle.message_event.is_set(), "what waits for a message is told so by an event"
    assert (protocol.transport, list(protocol.pipeline), protocol.server_state.default_headers) == (transport, [], [])
    assert protocol.loop is asyncio.get_running_loop()
    protocol.data_received(b"b")
    assert not cycle.more_body
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: lucid\r\n")
    assert protocol.cycle is cycle, "headers that are not whole have no cycle"
    assert protocol.scope is not cycle.scope, "and a scope of their own"
    protocol.shutdown()
    assert not cycle.keep_alive, "shutdown lets a request be answered, and closes then"
    await asyncio.wait(protocol.server_state.tasks)
    assert cycle.response_complete


async def test_the_scope_holds_what_aborts_the_connection(config: uvicorn.Config) -> None:
    """It is there for every request, also for one behind another in the same packet."""
    scopes: list[dict[str, Any]] = []
    last = asyncio.Event()

    async def remember(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scopes.append(scope)
        if len(scopes) == 3:
            last.set()
        await answer_ok(scope, receive, send)

    config.loaded_app = remember
    protocol, transport = HttpProtocol(config, ServerState(), {}), Transport()
    protocol.connection_made(transport)
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: lucid\r\n\r\n" * 3)
    await asyncio.wait_for(last.wait(), 5)
    for scope in scopes:
        transport.is_aborted = False
        scope["extensions"][ABORT]()
        assert transport.is_aborted
    protocol.connection_lost(None)
