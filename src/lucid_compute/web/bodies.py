"""Request bodies: read within limits of size, time and memory, and decompressed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from lucid_compute.errors import InvalidRequest, Overloaded, PayloadTooLarge, UnsupportedMediaType
from lucid_compute.wire import FieldFault

MAX_BODY_BYTES = 1024 * 1024
MAX_HELD_BYTES = 256 * 1024 * 1024
BODY_SECONDS = 30.0
STEP_BYTES = 64 * 1024  # decompressed at a time: under a millisecond of work
ENCODINGS = {b"gzip": "gzip", b"x-gzip": "gzip", b"deflate": "deflate"}
TAKEN = ("gzip", "deflate", "identity")
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # found out from the first bytes
_RAW = -zlib.MAX_WBITS


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


class BodyRoom:
    """The memory for request bodies of one worker: what is received and still needed, in bytes."""

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, count: int) -> None:
        """Take `count` bytes.

        Raises:
            Overloaded: there is not so much room.
        """
        if self.held_bytes + count > self._limit_bytes:
            message = "The bodies of the requests that run fill the memory for them. Send it again after Retry-After."
            raise Overloaded(message, retry_after_seconds=1)
        self.held_bytes += count

    def give_back(self, count: int) -> None:
        """Give back what was taken."""
        self.held_bytes -= count


class Body:
    """The body of one request. `release` gives its room back once the request has ended."""

    def __init__(
        self,
        room: BodyRoom,
        headers: Mapping[bytes, bytes],
        limit_bytes: int = MAX_BODY_BYTES,
        *,
        takes_form: bool = False,
    ) -> None:
        """`takes_form`: a form in several parts is accepted."""
        self._room = room
        self._headers = headers
        self._limit_bytes = limit_bytes
        self._takes_form = takes_form
        self._held_bytes = 0

    async def read(self, receive: Receive, deadline_seconds: float = BODY_SECONDS) -> bytes:
        """Return the complete body, decompressed.

        Raises:
            PayloadTooLarge: it is over the limit, or its Content-Length is.
            UnsupportedMediaType: it is in another encoding than gzip and deflate, or in several parts.
            InvalidRequest: it did not come within `deadline_seconds`, or can't be decompressed.
            Overloaded: the worker holds as many bytes of bodies as it may.
            ClientLeft: the client closed the connection.
        """
        try:
            async with asyncio.timeout(deadline_seconds):
                return await self.read_undisturbed(receive)
        except TimeoutError:
            raise body_too_slow(deadline_seconds) from None

    async def read_undisturbed(self, receive: Receive) -> bytes:
        """Return the complete body, decompressed, without a deadline; raise as `read` does."""
        inflater = _inflater_of(self._headers, takes_form=self._takes_form)
        declared = self._headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._limit_bytes:
            raise PayloadTooLarge(self._limit_bytes)
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            if inflater is None:
                self._hold(part, parts)
            else:
                async for piece in inflater.pieces(part):
                    self._hold(piece, parts)
            if not message.get("more_body"):
                break
        if inflater is not None:
            inflater.require_end()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Give its room back."""
        self._room.give_back(self._held_bytes)
        self._held_bytes = 0

    def _hold(self, part: bytes, parts: list[bytes]) -> None:
        if self._held_bytes + len(part) > self._limit_bytes:
            raise PayloadTooLarge(self._limit_bytes)
        self._room.take(len(part))
        self._held_bytes += len(part)
        if part:
            parts.append(part)


class _Inflater:
    """Decompresses one body step by step, so that neither time nor memory depend on what it expands to."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._has_begun = False

    async def pieces(self, part: bytes) -> AsyncIterator[bytes]:
        """Yield what a part of the body expands to; other tasks run between two pieces.

        Raises:
            InvalidRequest: it can't be decompressed.
        """
        if part and not self._has_begun:
            self._has_begun = True
            if self._encoding == "deflate" and not _is_zlib(part):  # some clients leave its frame out
                self._stream = zlib.decompressobj(_RAW)
        for start in range(0, len(part), STEP_BYTES):
            rest, is_full = part[start : start + STEP_BYTES], True
            while rest or is_full:
                try:
                    piece = self._stream.decompress(rest, STEP_BYTES)
                except zlib.error:
                    raise self._broken() from None
                if self._stream.unused_data:  # a second member, or garbage
                    raise self._broken()
                rest, is_full = self._stream.unconsumed_tail, len(piece) == STEP_BYTES
                yield piece
                await asyncio.sleep(0)

    def require_end(self) -> None:
        """Check that the compressed body is complete.

        Raises:
            InvalidRequest: it is not.
        """
        if self._has_begun and not self._stream.eof:
            raise self._broken()

    def _broken(self) -> InvalidRequest:
        message = f"The body is not one complete {self._encoding} stream, as its Content-Encoding says. Send it again."
        return InvalidRequest([FieldFault("", message)], status=400)


def _is_zlib(part: bytes) -> bool:
    """Return whether a stream begins with zlib's frame (RFC 1950)."""
    return part[0] & 0x0F == zlib.DEFLATED and (len(part) == 1 or int.from_bytes(part[:2], "big") % 31 == 0)


def _inflater_of(headers: Mapping[bytes, bytes], *, takes_form: bool) -> _Inflater | None:
    """Return what decompresses the body; None if it is not compressed.

    Raises:
        UnsupportedMediaType: its encoding or its form is not accepted.
    """
    if not takes_form and headers.get(b"content-type", b"").lstrip()[:10].lower() == b"multipart/":
        message = "A body in several parts is not accepted. Send one JSON object with Content-Type: application/json."
        raise UnsupportedMediaType(message, details={"types": ["application/json"]})
    sent = headers.get(b"content-encoding")
    if sent is None or (name := sent.strip().lower()) in {b"", b"identity"}:
        return None
    if (encoding := ENCODINGS.get(name)) is None:
        message = "The body's Content-Encoding is not accepted. Send it as gzip or deflate, or without compression."
        raise UnsupportedMediaType(message, details={"encodings": [*TAKEN]})
    return _Inflater(encoding)


def body_too_slow(deadline_seconds: float = BODY_SECONDS) -> InvalidRequest:
    """Return the refusal of a request whose body does not come."""
    fault = FieldFault("", f"The body did not come within {deadline_seconds:.0f} s. Send it again, faster.")
    return InvalidRequest([fault], status=400)
