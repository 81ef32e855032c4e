"""Frames of a tunnel: what is written is read again, and garbage is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.tunnel.frames import (
    MAX_PAYLOAD_BYTES,
    MAX_RECEIVED_BYTES,
    Frame,
    FrameFault,
    FrameKind,
    Hello,
    read_amount,
    read_frames,
    write_frame,
    write_hello,
    write_window,
)

frames = st.builds(Frame, st.sampled_from(FrameKind), st.integers(0, 2**32 - 1), st.binary(max_size=300))


@given(st.lists(frames, max_size=20))
def test_frames_of_one_message_are_read_as_they_were_written(sent: list[Frame]) -> None:
    assert list(read_frames(b"".join(write_frame(*frame) for frame in sent))) == sent


@given(st.binary(max_size=500))
def test_garbage_is_frames_or_a_fault_and_nothing_else(garbage: bytes) -> None:
    try:
        found = list(read_frames(garbage))
    except FrameFault:
        return
    assert b"".join(write_frame(*frame) for frame in found) == garbage


@pytest.mark.parametrize(
    "message",
    [
        b"\x02\x00\x00",
        b"\x63" + bytes(8),
        write_frame(FrameKind.DATA, 1, b"four")[:-1],
        write_frame(FrameKind.DATA, 1, bytes(MAX_PAYLOAD_BYTES + 1)),
        bytes(MAX_RECEIVED_BYTES + 1),
    ],
    ids=["half a head", "no such kind", "cut short", "long payload", "long message"],
)
def test_a_broken_message_is_refused(message: bytes) -> None:
    with pytest.raises(FrameFault):
        list(read_frames(message))


def test_a_window_names_an_amount() -> None:
    (frame,) = read_frames(write_window(7, 131_072))
    assert (frame.kind, frame.stream_id, read_amount(frame.payload)) == (FrameKind.WINDOW, 7, 131_072)
    for payload in (b"", b"\0\0\0\0", b"\0\0\0\1\0"):
        with pytest.raises(FrameFault):
            read_amount(payload)


def test_a_greeting_names_the_replica_and_ignores_what_a_newer_one_adds() -> None:
    hello = Hello(replica_id="r1", replicas=3)
    (frame,) = read_frames(write_hello(hello))
    assert Hello.read(frame.payload) == hello
    assert Hello.read(b'{"version":2,"replicaId":"r2","replicas":1,"colour":"red"}').replica_id == "r2"
    for payload in (b"", b"{}", b'{"replicaId":"r","replicas":0}', b'{"replicaId":"","replicas":1}', b"\xff"):
        with pytest.raises(FrameFault):
            Hello.read(payload)
