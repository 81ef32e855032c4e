"""The service's end of a tunnel: a WebSocket on a connection that uvicorn accepted.

It uses the sans-I/O half of `websockets`. uvicorn's own WebSockets pass each message through a queue and a task, which
costs more than the message.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.server import ServerState
from websockets.exceptions import ProtocolError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from lucid_compute.tunnel.frames import MAX_RECEIVED_BYTES, FrameFault, FrameKind, write_frame
from lucid_compute.tunnel.frames import Frame as TunnelFrame
from lucid_compute.tunnel.multiplex import Multiplexer
from lucid_compute.tunnel.tunnels import TunnelGrant, Tunnels

READY_SECONDS = 10.0  # for the agent to decide whether it keeps the connection
SILENCE_SECONDS = 30.0  # the agent sends a ping every ten seconds
ALONE_SECONDS = 0.1  # between two looks whether clients are still served, while the service stops
MAX_UNREAD_BYTES = 4 * 1024 * 1024  # written, and not read by the agent: pongs, windows and a part of a request
MAX_REASON_BYTES = 120
_SWITCHING_PROTOCOLS = 101


class TunnelConnection(asyncio.Protocol):
    """One agent's connection. `multiplexer` has its streams."""

    def __init__(self, state: ServerState, head: bytes, tunnels: Tunnels, grant: TunnelGrant) -> None:
        """`head` is the request that asked for the WebSocket; `state` has the server's connections."""
        self.grant = grant
        self.multiplexer = Multiplexer(self._schedule, on_control=self._receive_control)
        self._state = state
        self._head = head
        self._tunnels = tunnels
        self._loop = asyncio.get_running_loop()
        self._websocket = ServerProtocol(max_size=MAX_RECEIVED_BYTES)
        self._is_full = self._is_scheduled = self._is_ready = self._is_closing = False
        self._opened_at = self._received_at = self._loop.time()

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the response to the request, and greet the agent."""
        self._transport = cast("asyncio.Transport", transport)
        self._websocket.receive_data(self._head)
        request = cast("Request", self._websocket.events_received()[0])
        response = self._websocket.accept(request)
        self._websocket.send_response(response)
        self._write()
        if response.status_code != _SWITCHING_PROTOCOLS:
            self._transport.close()
            return
        self._state.connections.add(self)  # type: ignore[arg-type]  # uvicorn only calls its `shutdown`
        self._tunnels.add(self)
        self.multiplexer.send_control(self._tunnels.greeting)

    def data_received(self, data: bytes) -> None:
        """Read messages. A fault ends the connection."""
        self._received_at = self._loop.time()
        try:
            self._websocket.receive_data(data)
            for event in self._websocket.events_received():
                self._receive_message(event)
        except FrameFault as fault:
            self.close(str(fault))
        except (EOFError, ProtocolError):  # it has ended already
            self._transport.abort()
        self._write()
        if self._websocket.close_expected():
            self._transport.close()

    def pause_writing(self) -> None:
        """Send no data until the agent has read."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Send what waits."""
        self._is_full = False
        self._schedule()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio passes it
        """End every stream."""
        self._is_closing = True
        self._state.connections.discard(self)
        self._tunnels.remove(self)
        self.multiplexer.close()

    # --- called by uvicorn

    def shutdown(self) -> None:
        """Tell the agent to move. Close once no client is served any more, because its request may need this node."""
        self.multiplexer.send_control(write_frame(FrameKind.MOVE))
        self._close_when_alone()

    # --- called by the tunnels and their watch

    def find_fault(self) -> str | None:
        """Return why the connection has to end: its agent is silent, or did not keep it in time."""
        now = self._loop.time()
        if now - self._received_at > SILENCE_SECONDS:
            return f"Nothing came for {SILENCE_SECONDS:.0f} s."
        if not self._is_ready and now - self._opened_at > READY_SECONDS:
            return f"The agent did not say in {READY_SECONDS:.0f} s that it keeps this connection."
        return None

    def close(self, reason: str) -> None:
        """End the connection, and tell the agent why."""
        if not self._is_closing:
            self._is_closing = True
            self._websocket.fail(CloseCode.POLICY_VIOLATION, reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore"))
            self._write()
            self._transport.close()
            self.connection_lost(None)

    # --- inside

    def _receive_message(self, event: object) -> None:
        """Handle one WebSocket frame; the library answers pings and closes.

        Raises:
            FrameFault: it is no complete binary message.
        """
        if not isinstance(event, Frame) or self._is_closing:
            return
        if event.opcode in {Opcode.PING, Opcode.PONG, Opcode.CLOSE}:
            return
        if event.opcode is not Opcode.BINARY or not event.fin:
            raise FrameFault("A message is not binary, or comes in parts.")
        self.multiplexer.receive(bytes(event.data))

    def _receive_control(self, frame: TunnelFrame) -> None:
        if frame.kind is not FrameKind.READY:
            raise FrameFault(f"An agent sends no frame of kind {frame.kind.name}.")
        if not self._is_ready:
            self._is_ready = True
            self._tunnels.use(self)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, as far as the agent reads."""
        self._is_scheduled = False
        while not self._is_closing and (message := self.multiplexer.take(with_data=not self._is_full)):
            self._websocket.send_binary(message)
            self._write()

    def _write(self) -> None:
        """Write what the library has to send; give an agent up that does not read."""
        for data in self._websocket.data_to_send():
            if data and not self._transport.is_closing():
                self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self._transport.abort()

    def _close_when_alone(self) -> None:
        if self._is_closing:
            return
        if all(isinstance(each, TunnelConnection) for each in self._state.connections):
            self.close("The service stops.")
        else:
            self._loop.call_later(ALONE_SECONDS, self._close_when_alone)
