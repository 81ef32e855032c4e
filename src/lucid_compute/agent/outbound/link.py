"""One connection to one replica of the service: a WebSocket, the streams on it, and what the replica says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from lucid_compute.agent.outbound.forwarder import Forwarder
from lucid_compute.tunnel.frames import Frame, FrameFault, FrameKind, Hello, write_frame
from lucid_compute.tunnel.multiplex import Multiplexer

GREETING_SECONDS = 10.0


class Link:
    """A connection that is open. `replica` is known once the service has greeted.

    `is_moving`: the replica stops, and opens no further streams. `ended_with`: what the service said at the end.
    """

    def __init__(self, websocket: ClientConnection, forwarder: Forwarder, on_change: Callable[[], None]) -> None:
        """`on_change` is called when the replica says something new of itself."""
        self._websocket = websocket
        self._on_change = on_change
        self._greeted = asyncio.Event()
        self._has_output = asyncio.Event()
        self._multiplexer = Multiplexer(
            self._has_output.set, on_open=forwarder.accept, on_control=self._receive_control
        )
        self.replica: Hello | None = None
        self.is_moving = False
        self.ended_with = ""

    async def run(self) -> None:
        """Receive and send until the connection ends."""
        sending = asyncio.create_task(self._send())
        try:
            async for message in self._websocket:
                if not isinstance(message, bytes):
                    raise FrameFault("A message is not binary.")
                self._multiplexer.receive(message)
        except FrameFault as fault:
            self.ended_with = str(fault)
            await self._websocket.close(CloseCode.PROTOCOL_ERROR, str(fault)[:100])
        except ConnectionClosed as closed:
            self.ended_with = closed.rcvd.reason if closed.rcvd is not None else "the connection was lost"
        finally:
            self._greeted.set()
            sending.cancel()
            self._multiplexer.close()
            self._websocket.transport.abort()

    async def greeting(self) -> Hello | None:
        """Return what the replica said first; None if it says nothing in time, or the connection ends."""
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                await self._greeted.wait()
        except TimeoutError:
            pass
        return self.replica

    def keep(self) -> None:
        """Tell the replica that it may send requests."""
        self._multiplexer.send_control(write_frame(FrameKind.READY))

    async def _send(self) -> None:
        try:
            while True:
                await self._has_output.wait()
                self._has_output.clear()
                while message := self._multiplexer.take():
                    await self._websocket.send(message)
        except ConnectionClosed:
            return

    def _receive_control(self, frame: Frame) -> None:
        if frame.kind is FrameKind.HELLO:
            self.replica = Hello.read(frame.payload)
            self._greeted.set()
        elif frame.kind is FrameKind.MOVE:
            self.is_moving = True
        else:
            raise FrameFault(f"A service sends no frame of kind {frame.kind.name}.")
        self._on_change()
