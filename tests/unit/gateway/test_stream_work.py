"""Whatever a node sends in a stream, the work on it grows with its bytes and no faster: counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic_core
import pytest

from lucid_compute.egress.faults import EgressFault
from lucid_compute.gateway import event_stream, node_json
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.event_stream import EventStream
from lucid_compute.gateway.node_json import PARSED_BYTES, read_object

BLOCK = 48 * 1024  # read at once, at most
CONTENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class Work:
    """The events that were parsed, and their bytes."""

    def __init__(self) -> None:
        self.events = self.bytes = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Counts what the parser of JSON is given; it parses as ever."""
    counted = Work()

    def from_json(text: bytes, **options: Any) -> Any:
        counted.events += 1
        counted.bytes += len(text)
        return pydantic_core.from_json(text, **options)

    monkeypatch.setattr(node_json, "from_json", from_json)
    return counted


def blocks_of(stream: bytes, size: int = BLOCK) -> Iterator[bytes]:
    """Yield a stream as it is read."""
    return (stream[at : at + size] for at in range(0, len(stream), size))


STREAMS = {
    "errors that are none": b'data: {"error":0}\n\n',
    "usages": b'data: {"usage":{"usage":{}}}\n\n',
    "finishes": b'data: {"choices":[{"index":%d,"finish_reason":"stop"}]}\n\n',
    "comments": b":\n\n",
    "blank lines": b"\n\n",
    "data without a value": b"data\n\n",
    "keys and white space": b'data: {"error"   "usage"   "finish_reason"   :\n\n',
    "text about errors": b'data: {"choices":[{"delta":{"content":"error"}}]}\n\n',
}


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("name", STREAMS)
def test_each_event_is_parsed_a_few_times_at_most(work: Work, name: str, endpoint: str) -> None:
    """Once for each question that it raises: an error, a usage, a finish, an end, content."""
    stream = STREAMS[name].replace(b"%d", b"7") * 20_000
    taken = EventStream(ENDPOINTS[endpoint], withholds_usage=True, choices=3)
    for block in blocks_of(stream):
        taken.feed(block)
        assert len(taken._held) <= event_stream.MAX_HELD_BYTES
    assert work.bytes <= 5 * len(stream)
    assert len(taken._finished) <= 3


@pytest.mark.parametrize("size", [BLOCK, 1000])
def test_one_event_is_searched_once_however_many_blocks_it_takes(work: Work, size: int) -> None:
    """And parsed in its beginning only."""
    lines = b'data: {"error":"usage","finish_reason":\ndata: "stop" ' * 30_000
    taken = EventStream(ENDPOINTS["chat/completions"], withholds_usage=True)
    for block in (CONTENT, *blocks_of(lines, size)):
        taken.feed(block)
    assert work.events <= 3
    taken.feed(b"\n\n")
    assert work.bytes <= 5 * PARSED_BYTES


def test_a_line_that_never_ends_is_bounded() -> None:
    """Before the first line end, nothing is known of the stream."""
    taken = EventStream(ENDPOINTS["chat/completions"], withholds_usage=True, max_event_bytes=100_000)
    for _ in range(1000):
        assert taken.feed(b"x" * 100) == b""
    with pytest.raises(EgressFault):
        taken.feed(b"x")


@pytest.mark.parametrize("unit", [b"[],", b'{"a":1},', b"1,", b'"",', b"[" * 150 + b"]" * 150 + b","])
def test_a_whole_answer_is_parsed_in_its_beginning(work: Work, unit: bytes) -> None:
    """However long it is; its end is looked at only."""
    answer = b'{"choices":[{"message":{}}],"a":[' + unit * (2_000_000 // len(unit)) + b"0]}"
    value = read_object(answer)
    assert value is not None
    assert (value["choices"], work.events, work.bytes) == ([{"message": {}}], 1, PARSED_BYTES)
    assert read_object(answer[:-1]) is None
