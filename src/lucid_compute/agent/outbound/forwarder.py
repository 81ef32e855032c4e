"""Passes the requests of one stream each on to the inference server, and its responses back, as bytes."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections import deque
from typing import cast
from urllib.parse import urlsplit

from lucid_compute.agent.outbound.request_head import MAX_HEAD_BYTES, HeadReader, HeadRefused, RequestHead
from lucid_compute.tunnel.multiplex import TunnelStream

CONNECT_SECONDS = 5.0
MAX_UNSENT_BYTES = 64 * 1024  # of a response; then no more is read from the inference server
_PORTS = {"http": 80, "https": 443}
_log = logging.getLogger(__name__)


class IncomingStream:
    """A stream that the service opened, as the handler of its bytes. It ends its task when the service resets it."""

    def __init__(self, stream: TunnelStream) -> None:
        self.stream = stream
        self.task: asyncio.Task[None] | None = None
        self.server: ServerConnection | None = None
        self._parts: deque[bytes] = deque()
        self._has_changed = asyncio.Event()
        stream.handler = self

    async def read(self) -> bytes:
        """Return the next bytes of the request; the caller consumes them."""
        while not self._parts:
            self._has_changed.clear()
            await self._has_changed.wait()
        return self._parts.popleft()

    # --- called by the stream

    def data_received(self, data: bytes) -> None:
        """Keep data until it is read."""
        self._parts.append(data)
        self._has_changed.set()

    def end_received(self) -> None:
        """Do nothing: the service never ends a stream."""

    def reset_received(self) -> None:
        """End the request at once: the client left, or the connection is lost."""
        if self.task is not None:
            self.task.cancel()

    def window_opened(self) -> None:
        """Go on reading from the inference server."""
        if self.server is not None:
            self.server.resume_reading()


class ServerConnection(asyncio.Protocol):
    """A connection to the inference server, for one request. What it sends goes into the stream as it comes.

    `ended` is done when the server has closed it; then the response is complete.
    """

    def __init__(self, stream: TunnelStream) -> None:
        self._stream = stream
        self._is_paused = False
        self._can_write = asyncio.Event()
        self._can_write.set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def write(self, data: bytes) -> None:
        """Write a part of the request, and wait while the server does not read.

        Raises:
            ConnectionError: the connection is closed.
        """
        if self._transport.is_closing():
            raise ConnectionResetError
        self._transport.write(data)
        await self._can_write.wait()

    def close(self) -> None:
        """Close the connection at once. A response that has not ended is incomplete."""
        if not self.ended.done():
            self.ended.set_exception(ConnectionAbortedError())
        self._transport.abort()

    def resume_reading(self) -> None:
        """Read on, once little enough is unsent."""
        if self._is_paused and self._stream.unsent_bytes <= MAX_UNSENT_BYTES:
            self._is_paused = False
            self._transport.resume_reading()

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Send a part of the response; read no more while too much is unsent."""
        self._stream.write(data)
        if self._stream.unsent_bytes > MAX_UNSENT_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Let the request wait."""
        self._can_write.clear()

    def resume_writing(self) -> None:
        """Go on with the request."""
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        """End the response."""
        self._can_write.set()
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)


class Forwarder:
    """Passes requests on to the server at `url`, and to no other."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._heads = HeadReader(url, key)
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, stream: TunnelStream) -> None:
        """Serve a stream in a task of its own."""
        incoming = IncomingStream(stream)
        task = incoming.task = asyncio.create_task(self._serve(incoming))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, incoming: IncomingStream) -> None:
        """Serve one request. Whatever goes wrong ends this stream and no other."""
        stream = incoming.stream
        try:
            head, body = await self._read_head(incoming)
            await self._exchange(incoming, head, body)
        except HeadRefused as refused:
            _log.warning("a request of the service was refused: %s", refused)
            stream.reset()
        except (OSError, TimeoutError, EOFError) as error:
            _log.info("a request ended early: %s", error or type(error).__name__)
            stream.reset()
        except asyncio.CancelledError:
            stream.reset()
            raise
        except Exception:  # noqa: BLE001 - what one request meets must not end the others
            _log.exception("a request ended early")
            stream.reset()
        finally:
            stream.handler = None

    async def _read_head(self, incoming: IncomingStream) -> tuple[RequestHead, bytes]:
        """Return the head for the inference server, and what came of the body.

        Raises:
            HeadRefused: it is too long, or asks for something else than an endpoint.
        """
        received = await incoming.read()
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > MAX_HEAD_BYTES:
                raise HeadRefused(f"The head is over {MAX_HEAD_BYTES:,} bytes.")
            received += await incoming.read()
        head = self._heads.read(received[: end + 4])
        body = received[end + 4 :]
        if len(body) > head.body_bytes:
            raise HeadRefused("More bytes came than the body has.")
        incoming.stream.consume(end + 4)
        return head, body

    async def _exchange(self, incoming: IncomingStream, head: RequestHead, body: bytes) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, server = await asyncio.get_running_loop().create_connection(
                    lambda: ServerConnection(incoming.stream), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError):
            _answer_unreached(incoming)
            return
        incoming.server = server
        sending = asyncio.create_task(_send(incoming, server, head, body))
        try:
            await server.ended
            incoming.stream.end()
        finally:
            incoming.server = None
            sending.cancel()
            server.close()
            await asyncio.wait({sending})


async def _send(incoming: IncomingStream, server: ServerConnection, head: RequestHead, body: bytes) -> None:
    """Send the request: exactly as many bytes as its head says. A fault ends the connection, and so the response."""
    left = head.body_bytes - len(body)
    try:
        await server.write(head.head + body)
        incoming.stream.consume(len(body))
        while left:
            data = await incoming.read()
            if len(data) > left:
                raise HeadRefused("More bytes came than the body has.")
            left -= len(data)
            await server.write(data)
            incoming.stream.consume(len(data))
    except HeadRefused as refused:
        _log.warning("a request of the service was refused: %s", refused)
        server.close()
    except OSError:
        server.close()


def _answer_unreached(incoming: IncomingStream) -> None:
    """Send a response in the inference server's place: it does not accept a connection."""
    message = "The inference server does not accept connections from its agent."
    content = json.dumps({"error": {"message": message, "code": 502}}).encode()
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    incoming.stream.write(head + content)
    incoming.stream.end()
