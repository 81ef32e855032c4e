"""Streams over one connection: order, windows, turns, ends; and a peer that breaks the rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid_compute.tunnel.frames import (
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameFault,
    FrameKind,
    read_frames,
    write_frame,
    write_window,
)
from lucid_compute.tunnel.multiplex import MAX_STREAMS, WINDOW_BYTES, Multiplexer, TunnelStream


class Taker:
    """Keeps what a stream receives; `passes_on`: it consumes all of it at once."""

    def __init__(self, stream: TunnelStream, *, passes_on: bool = True) -> None:
        self.stream, self.passes_on = stream, passes_on
        self.received = b""
        self.ended = self.was_reset = False
        stream.handler = self

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.passes_on:
            self.stream.consume(len(data))

    def end_received(self) -> None:
        self.ended = True

    def reset_received(self) -> None:
        self.was_reset = True

    def window_opened(self) -> None:
        """Nothing waits for it here."""


class Pair:
    """A service and an agent, with no network between them."""

    def __init__(self, *, passes_on: bool = True) -> None:
        self.accepted: list[Taker] = []
        self.control: list[Frame] = []
        self.service = Multiplexer(lambda: None, on_control=self.control.append)
        self.agent = Multiplexer(
            lambda: None,
            on_open=lambda stream: self.accepted.append(Taker(stream, passes_on=passes_on)),
            on_control=self.control.append,
        )

    def open(self, request: bytes, *, passes_on: bool = True) -> Taker:
        """Open a stream from the service and send a request on it."""
        stream = self.service.open()
        assert stream is not None
        taker = Taker(stream, passes_on=passes_on)
        stream.write(request)
        self.deliver()
        return taker

    def deliver(self) -> int:
        """Deliver all messages, in both directions; return how many there were."""
        count, before = 0, -1
        while count > before:
            before = count
            for sender, receiver in ((self.service, self.agent), (self.agent, self.service)):
                if message := sender.take():
                    receiver.receive(message)
                    count += 1
        return count


def receive_all(side: Multiplexer, messages: list[bytes]) -> None:
    for message in messages:
        side.receive(message)


def test_a_request_and_its_response_cross_and_the_stream_is_gone() -> None:
    pair = Pair()
    asked = pair.open(b"question")
    (served,) = pair.accepted
    served.stream.write(b"ans")
    served.stream.write(b"wer")
    served.stream.end()
    pair.deliver()
    assert (served.received, asked.received, asked.ended) == (b"question", b"answer", True)
    assert len(pair.service) == len(pair.agent) == 0


def test_a_small_request_takes_one_message() -> None:
    pair = Pair()
    stream = pair.service.open()
    assert stream is not None
    stream.write(b"question")
    assert [frame.kind for frame in read_frames(pair.service.take())] == [FrameKind.OPEN]
    assert pair.service.take() == b""


@given(st.lists(st.binary(min_size=1, max_size=MAX_PAYLOAD_BYTES * 3), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_bytes_arrive_complete_and_in_order_however_they_were_written(parts: list[bytes]) -> None:
    pair = Pair()
    asked = pair.open(b"q")
    for part in parts:
        pair.accepted[0].stream.write(part)
    pair.accepted[0].stream.end()
    pair.deliver()
    assert asked.received == b"".join(parts)
    assert asked.ended


def test_a_reader_that_does_not_read_holds_a_window_and_no_more() -> None:
    pair = Pair()
    slow = pair.open(b"q", passes_on=False)
    quick = pair.open(b"q")
    for served in pair.accepted:
        served.stream.write(bytes(WINDOW_BYTES * 3))
        served.stream.end()
    pair.deliver()
    assert len(slow.received) == WINDOW_BYTES
    assert pair.accepted[0].stream.unsent_bytes == WINDOW_BYTES * 2
    assert len(quick.received) == WINDOW_BYTES * 3
    assert (quick.ended, slow.ended) == (True, False)
    slow.passes_on = True
    slow.stream.consume(WINDOW_BYTES)
    pair.deliver()
    assert len(slow.received) == WINDOW_BYTES * 3
    assert slow.ended


def test_streams_take_turns() -> None:
    pair = Pair()
    pair.open(b"q")
    pair.open(b"q")
    pair.accepted[0].stream.write(bytes(MAX_PAYLOAD_BYTES * 10))
    pair.accepted[1].stream.write(b"short")
    first = [frame.stream_id for frame in read_frames(pair.agent.take())]
    assert first[:2] == [1, 2]


def test_a_reset_ends_both_sides_and_what_was_under_way_is_dropped() -> None:
    pair = Pair()
    asked = pair.open(b"q")
    pair.accepted[0].stream.write(bytes(WINDOW_BYTES))
    under_way = pair.agent.take()
    asked.stream.reset()
    pair.service.receive(under_way)
    pair.deliver()
    assert (asked.received, pair.accepted[0].was_reset) == (b"", True)
    assert len(pair.service) == len(pair.agent) == 0


def test_a_stream_that_is_reset_before_it_was_sent_is_never_sent() -> None:
    pair = Pair()
    stream = pair.service.open()
    assert stream is not None
    stream.write(b"question")
    stream.reset()
    assert pair.service.take() == b""
    assert pair.open(b"next").stream.id == 2
    assert [served.received for served in pair.accepted] == [b"next"]


def test_a_connection_that_does_not_drain_sends_no_data_and_still_grants_windows() -> None:
    pair = Pair()
    asked = pair.open(b"q", passes_on=False)
    pair.accepted[0].stream.write(bytes(WINDOW_BYTES))
    pair.deliver()
    asked.stream.write(b"more of the body")
    asked.stream.consume(WINDOW_BYTES)
    assert [frame.kind for frame in read_frames(pair.service.take(with_data=False))] == [FrameKind.WINDOW]
    assert pair.service.take(with_data=False) == b""
    assert [frame.kind for frame in read_frames(pair.service.take())] == [FrameKind.DATA]


def test_the_loss_of_the_connection_resets_every_stream() -> None:
    pair = Pair()
    asked = [pair.open(b"q"), pair.open(b"q")]
    pair.service.close()
    assert [each.was_reset for each in asked] == [True, True]
    assert pair.service.take() == b""


def test_no_more_streams_than_the_limit_are_open() -> None:
    pair = Pair()
    opened = [pair.service.open() for _ in range(MAX_STREAMS)]
    assert all(opened)
    assert pair.service.open() is None


def test_an_agent_resets_streams_over_the_limit() -> None:
    pair = Pair()
    for stream_id in range(1, MAX_STREAMS + 2):
        pair.agent.receive(write_frame(FrameKind.OPEN, stream_id, b"q"))
    assert len(pair.accepted) == MAX_STREAMS
    assert list(read_frames(pair.agent.take())) == [Frame(FrameKind.RESET, MAX_STREAMS + 1, b"")]


BREACHES: dict[str, Callable[[], bytes]] = {
    "a stream that nobody opened": lambda: write_frame(FrameKind.DATA, 9, b"answer"),
    "an end that nobody waits for": lambda: write_frame(FrameKind.END, 9),
    "a stream opened by the agent": lambda: write_frame(FrameKind.OPEN, 9, b"q"),
    "more than the window": lambda: write_frame(FrameKind.DATA, 1, bytes(MAX_PAYLOAD_BYTES)) * 5,
    "data without bytes": lambda: write_frame(FrameKind.DATA, 1),
    "a window nobody needs": lambda: write_window(1, WINDOW_BYTES),
    "a window of nothing": lambda: write_frame(FrameKind.WINDOW, 1, bytes(4)),
    "a greeting on a stream": lambda: write_frame(FrameKind.HELLO, 1),
    "data for the connection": lambda: write_frame(FrameKind.DATA, 0, b"x"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_an_agent_that_breaks_a_rule_is_found_out(breach: str) -> None:
    pair = Pair()
    pair.open(b"q", passes_on=False)
    message, times = BREACHES[breach](), 4 if breach == "more than the window" else 1
    with pytest.raises(FrameFault):
        receive_all(pair.service, [message] * times)


def test_a_stream_that_goes_on_for_ever_after_its_reset_is_found_out() -> None:
    pair = Pair()
    pair.open(b"q").stream.reset()
    data = write_frame(FrameKind.DATA, 1, bytes(MAX_PAYLOAD_BYTES))
    with pytest.raises(FrameFault):
        receive_all(pair.service, [data] * (WINDOW_BYTES // MAX_PAYLOAD_BYTES + 2))


def test_a_service_may_not_end_a_stream_nor_open_one_twice() -> None:
    for message in (write_frame(FrameKind.END, 1), write_frame(FrameKind.OPEN, 1)):
        pair = Pair()
        pair.open(b"q")
        with pytest.raises(FrameFault):
            pair.agent.receive(message)


@given(
    st.lists(st.binary(max_size=60) | st.builds(write_frame, st.sampled_from(FrameKind), st.integers(0, 3)), max_size=8)
)
def test_garbage_never_raises_anything_but_a_fault(messages: list[bytes]) -> None:
    pair = Pair()
    pair.open(b"q")
    for side in (pair.service, pair.agent):
        try:
            for message in messages:
                side.receive(message)
        except FrameFault:
            side.close()
    assert len(pair.service) <= 1
