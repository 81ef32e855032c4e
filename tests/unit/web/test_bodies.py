"""Bodies of requests: compressed in every way, too large before or after that, and more of them than fit."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from lucid_compute.errors import InvalidRequest, LucidError, Overloaded, PayloadTooLarge, UnsupportedMediaType
from lucid_compute.web.bodies import MAX_BODY_BYTES, Body, BodyRoom, ClientLeft

CONTENT = b'{"text": "' + b"lucid " * 20_000 + b'"}'


def raw_deflate(content: bytes) -> bytes:
    """Return what some clients call deflate: without zlib's frame."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(content) + stream.flush()


def receiver(parts: Sequence[bytes]) -> Any:
    """Return an ASGI `receive` that brings these parts, and then a disconnect."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    if messages:
        messages[-1]["more_body"] = False
    return receive


async def read(*parts: bytes, room: BodyRoom | None = None, limit: int = MAX_BODY_BYTES, **headers: str) -> bytes:
    """Return the body that arrives in these parts; its room is given back."""
    room = room or BodyRoom()
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    body = Body(room, sent, limit)
    try:
        content = await body.read(receiver(parts))
        assert room.held_bytes >= len(content)
        return content
    finally:
        body.release()
        assert room.held_bytes == 0


ENCODED = {
    "gzip": gzip.compress(CONTENT),
    "x-gzip": gzip.compress(CONTENT),
    " GZIP ": gzip.compress(CONTENT),
    "deflate": zlib.compress(CONTENT),
    "Deflate": raw_deflate(CONTENT),
    "identity": CONTENT,
    "": CONTENT,
}


@pytest.mark.parametrize(("encoding", "data"), ENCODED.items())
@pytest.mark.parametrize("size", [1, 100, 10**6])
async def test_a_compressed_body_is_decompressed(encoding: str, data: bytes, size: int) -> None:
    """However it is split."""
    size = max(size, len(data) // 3000)
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    assert await read(*parts, content_encoding=encoding) == CONTENT


async def test_what_expands_to_the_limit_is_read_and_no_byte_more() -> None:
    for extra, fits in ((0, True), (1, False)):
        data = gzip.compress(b"x" * (MAX_BODY_BYTES + extra))
        if fits:
            assert len(await read(data, content_encoding="gzip")) == MAX_BODY_BYTES
        else:
            with pytest.raises(PayloadTooLarge):
                await read(data, content_encoding="gzip")


async def test_a_bomb_is_refused_before_it_fills_memory() -> None:
    """Thirty times the limit in 30 KB; other tasks run meanwhile."""
    bomb = zlib.compress(b"0" * 30 * MAX_BODY_BYTES, 9)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            await read(bomb, content_encoding="deflate")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        counting.cancel()
    assert peak < 4 * MAX_BODY_BYTES
    assert turns > 10


BROKEN = {
    "no gzip at all": (b"{}", "gzip"),
    "half of it": (ENCODED["gzip"][:-10], "gzip"),
    "a wrong sum": (ENCODED["gzip"][:-8] + bytes(8), "gzip"),
    "two of them": (ENCODED["gzip"] * 2, "gzip"),
    "garbage behind it": (ENCODED["deflate"] + b"x", "deflate"),
    "no deflate": (b"\xff" * 100, "deflate"),
}


@pytest.mark.parametrize(("data", "encoding"), BROKEN.values(), ids=BROKEN)
async def test_what_is_not_what_it_says_is_named(data: bytes, encoding: str) -> None:
    """400, with the encoding in the sentence."""
    with pytest.raises(InvalidRequest, match=encoding) as refused:
        await read(data, content_encoding=encoding)
    assert refused.value.http_status == 400


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip, gzip", "compress", "gzip;q=1"])
async def test_another_encoding_is_refused_with_those_that_are_taken(encoding: str) -> None:
    """Before a byte of the body is read."""

    async def receive() -> Any:
        raise AssertionError

    with pytest.raises(UnsupportedMediaType, match="gzip or deflate") as refused:
        await Body(BodyRoom(), {b"content-encoding": encoding.encode()}).read(receive)
    assert refused.value.details == {"encodings": ["gzip", "deflate", "identity"]}


async def test_a_form_in_parts_is_refused_with_the_type_that_is_taken() -> None:
    with pytest.raises(UnsupportedMediaType) as refused:
        await read(b"--x", content_type="Multipart/Form-Data; boundary=x")
    assert refused.value.details == {"types": ["application/json"]}


@pytest.mark.parametrize(
    ("parts", "headers", "error"),
    [
        ([b"x" * 11], {}, PayloadTooLarge),
        ([b"x" * 6, b"x" * 5], {}, PayloadTooLarge),
        ([b"x"], {"content_length": "11"}, PayloadTooLarge),
        ([b"x"], {"content_length": "9" * 5000}, PayloadTooLarge),
        ([], {}, ClientLeft),
    ],
)
async def test_a_body_over_the_limit_is_refused(
    parts: list[bytes], headers: dict[str, Any], error: type[Exception]
) -> None:
    """By its declared length, or as soon as it is too long."""
    with pytest.raises(error):
        await read(*parts, limit=10, **headers)
    assert await read(b"x" * 10, limit=10, content_length="10") == b"x" * 10


async def test_bodies_that_do_not_fit_are_refused_until_others_end() -> None:
    """What is received counts, not what is declared: a client could declare much and send nothing."""
    room = BodyRoom(100)
    first = Body(room, {b"content-length": b"1000"}, 1000)
    assert len(await first.read(receiver([b"x" * 60]))) == 60
    with pytest.raises(Overloaded) as refused:
        await read_in(room, b"x" * 30, b"x" * 11)
    assert refused.value.retry_after_seconds == 1
    assert room.held_bytes == 60
    await read_in(room, b"x" * 40)
    with pytest.raises(LucidError):
        await read_in(room, gzip.compress(b"x" * 41), encoding=b"gzip")
    first.release()
    first.release()
    assert room.held_bytes == 0
    await read_in(room, b"x" * 100)


async def read_in(room: BodyRoom, *parts: bytes, encoding: bytes = b"") -> None:
    """Read a body in a room that others use, and give its part back."""
    body = Body(room, {b"content-encoding": encoding})
    try:
        await body.read(receiver(parts))
    finally:
        body.release()
