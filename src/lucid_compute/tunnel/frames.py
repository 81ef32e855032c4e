"""The frames of a tunnel, as bytes. Pure.

A message of the tunnel holds one frame or more. A frame is its kind (one byte), the id of its stream (four bytes, 0 for
the connection), the length of its payload (four bytes), and the payload. Numbers are big-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

VERSION = 1
MAX_PAYLOAD_BYTES = 16 * 1024
MAX_MESSAGE_BYTES = 64 * 1024  # that we send
MAX_RECEIVED_BYTES = 128 * 1024  # of a message
_HEAD = Struct("!BII")
HEAD_BYTES = _HEAD.size
_AMOUNT = Struct("!I")


class FrameKind(IntEnum):
    """What a frame says. `OPEN`, `DATA`, `END`, `RESET` and `WINDOW` are about a stream, the others about all."""

    OPEN = 1  # a new stream, with the first bytes of a request; only the service sends it
    DATA = 2
    END = 3  # the response is complete, and so is the stream; only the agent sends it
    RESET = 4  # the stream is over at once
    WINDOW = 5  # the receiver has passed on so many bytes, which may be sent in addition
    HELLO = 6  # which replica this is, and how many live ones there are; again when that changes
    READY = 7  # the agent keeps this connection
    MOVE = 8  # the replica stops: no further stream is opened


class FrameFault(Exception):
    """The peer broke a rule of the protocol. The message says which; the connection has to end."""


class Frame(NamedTuple):
    """One frame."""

    kind: FrameKind
    stream_id: int
    payload: bytes


class Hello(BaseModel):
    """Which replica of the service this is, and how many live ones there are, this one included."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)

    version: int = VERSION
    replica_id: Annotated[str, Field(min_length=1, max_length=100)]
    replicas: Annotated[int, Field(ge=1, le=10_000)]

    @classmethod
    def read(cls, payload: bytes) -> Hello:
        """Read the payload of a HELLO frame; fields of a newer version are ignored.

        Raises:
            FrameFault: it is none.
        """
        try:
            return cls.model_validate_json(payload)
        except ValidationError:
            raise FrameFault("The greeting is not readable.") from None


_KINDS = {kind.value: kind for kind in FrameKind}


def write_frame(kind: FrameKind, stream_id: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """Return the bytes of one frame."""
    return b"".join((_HEAD.pack(kind, stream_id, len(payload)), payload))


def write_window(stream_id: int, amount: int) -> bytes:
    """Return the frame that allows `amount` further bytes on a stream."""
    return write_frame(FrameKind.WINDOW, stream_id, _AMOUNT.pack(amount))


def write_hello(hello: Hello) -> bytes:
    """Return the frame of a greeting."""
    return write_frame(FrameKind.HELLO, 0, hello.model_dump_json(by_alias=True).encode())


def read_amount(payload: bytes) -> int:
    """Return the number of bytes in the payload of a WINDOW frame, which is not 0.

    Raises:
        FrameFault: it is none.
    """
    amount: int = _AMOUNT.unpack(payload)[0] if len(payload) == _AMOUNT.size else 0
    if not amount:
        raise FrameFault("A window frame has no amount.")
    return amount


def read_frames(message: bytes) -> Iterator[Frame]:
    """Yield the frames of a message; those before a fault are yielded first.

    Raises:
        FrameFault: the message is too long, ends in the middle of a frame, or has a frame that is none.
    """
    length = len(message)
    if length > MAX_RECEIVED_BYTES:
        raise FrameFault(f"A message has {length:,} bytes, and {MAX_RECEIVED_BYTES:,} are allowed.")
    start = 0
    while start < length:
        if length - start < HEAD_BYTES:
            raise FrameFault("A message ends in the middle of a frame.")
        number, stream_id, size = _HEAD.unpack_from(message, start)
        start += HEAD_BYTES
        kind = _KINDS.get(number)
        if kind is None:
            raise FrameFault(f"No frame is of kind {number}.")
        if size > MAX_PAYLOAD_BYTES or size > length - start:
            raise FrameFault(f"A frame of {size:,} bytes is longer than its message, or than allowed.")
        yield Frame(kind, stream_id, message[start : start + size])
        start += size
