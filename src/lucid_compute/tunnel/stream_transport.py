"""A stream of a tunnel in the form of an asyncio transport, so that an HTTP connection can use it like a socket."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from lucid_compute.tunnel.multiplex import TunnelStream


class StreamTransport(asyncio.Transport):
    """The transport of one buffered protocol over one stream, on the service's side.

    While reading is paused, what comes is held: at most a window, because the stream grants no more until it is passed
    on.
    """

    __slots__ = ("_has_ended", "_held", "_is_paused", "_loop", "_protocol", "_stream")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, stream: TunnelStream, protocol: asyncio.BufferedProtocol
    ) -> None:
        """Connect the protocol to the stream."""
        super().__init__()
        self._loop = loop
        self._stream = stream
        self._protocol: asyncio.BufferedProtocol | None = protocol
        self._held: deque[bytes] = deque()
        self._is_paused = self._has_ended = False
        stream.handler = self
        protocol.connection_made(self)

    # --- called by the protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002 - asyncio asks so
        """Return the default: a stream has neither address nor certificate."""
        return default

    def is_closing(self) -> bool:
        """Return whether nothing can be written any more."""
        return self._stream.is_over

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data when the peer's window allows it."""
        self._stream.write(bytes(data))

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are not sent yet."""
        return self._stream.unsent_bytes

    def pause_reading(self) -> None:
        """Hold what comes."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Pass on what was held, and what comes."""
        self._is_paused = False
        if self._held or self._has_ended:
            self._loop.call_soon(self._pass_on)

    def close(self) -> None:
        """End the stream at once."""
        self.abort()

    def abort(self) -> None:
        """End the stream at once."""
        self._stream.reset()
        self._finish(None)

    # --- called by the stream

    def data_received(self, data: bytes) -> None:
        """Pass data on, or hold it."""
        self._held.append(data)
        if not self._is_paused:
            self._pass_on()

    def end_received(self) -> None:
        """Tell the protocol of the end, after what is held."""
        self._has_ended = True
        if not self._is_paused:
            self._pass_on()

    def reset_received(self) -> None:
        """Tell the protocol that the stream broke off."""
        self._finish(ConnectionResetError())

    def window_opened(self) -> None:
        """Do nothing: a request waits in one piece."""

    # --- inside

    def _pass_on(self) -> None:
        while self._held and not self._is_paused and (protocol := self._protocol) is not None:
            data = memoryview(self._held.popleft())
            size = len(data)
            while data and self._protocol is not None:
                buffer = memoryview(protocol.get_buffer(len(data)))
                part = min(len(buffer), len(data))
                buffer[:part] = data[:part]
                data = data[part:]
                protocol.buffer_updated(part)
            self._stream.consume(size)
        if self._has_ended and not self._held and not self._is_paused:
            self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        """Tell the protocol, once, that its connection is lost."""
        protocol, self._protocol = self._protocol, None
        self._held.clear()
        self._stream.handler = None  # a cycle, which only garbage collection would free
        if protocol is not None:
            self._loop.call_soon(protocol.connection_lost, error)
