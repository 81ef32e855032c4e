"""A raw HTTP connection for tests that misbehave, and what a refusal below HTTP looks like."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

PATIENCE_SECONDS = 45.0  # whatever is cut at all is cut sooner


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Client:
        """Return a new connection."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        """Send, as far as the other side still takes it."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def answer(self) -> bytes:
        """Return one answer's bytes, which have a Content-Length."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return head + await self._reader.readexactly(length)

    async def until(self, end: bytes) -> bytes:
        """Return what comes up to and with `end`."""
        return await self._reader.readuntil(end)

    async def rest(self) -> bytes:
        """Return everything that comes until the other side ends the connection."""
        read = b""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while data := await self._reader.read(65536):
                    read += data
        except ConnectionError:
            read += b"RESET"
        finally:
            await self.close()
        return read

    async def close(self) -> None:
        """Close it, whatever the other side thinks of that."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def drip(self, start: bytes, drop: bytes = b"", pause_seconds: float = 0.5) -> tuple[bytes, float]:
        """Send `start`, then a drop again and again; return what came until the end, and how long that took."""
        self.send(start)
        began, rest = time.monotonic(), asyncio.ensure_future(self.rest())
        while not (await asyncio.wait([rest], timeout=pause_seconds))[0]:
            self.send(drop)
        return await rest, time.monotonic() - began


async def ask(port: int, data: bytes) -> bytes:
    """Return what a new connection brings for these bytes, until it is ended."""
    client = await Client.open(port)
    client.send(data)
    return await client.rest()


def assert_refused(answer: bytes, status: int, answers_before: int = 0) -> None:
    """The last of the answers is a refusal in the contract's shape, and says that the connection ends."""
    assert answer.count(b"HTTP/1.1 ") == answers_before + 1, answer
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 %d " % status), answer
    assert {b"content-type: application/json", b"connection: close"} <= set(lines)
    assert b"content-length: %d" % len(body) in lines
    assert any(line.startswith(b"date: ") for line in lines)
    error = json.loads(body)["error"]
    message = error.pop("message")
    assert error == {"code": "INVALID_REQUEST", "status": status, "details": {}}
    assert message.endswith(".")
