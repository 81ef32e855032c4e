"""A stream taken in as bytes is understood as by a reader who parses each event: the slow way is the oracle."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.event_stream import EventStream
from lucid_compute.gateway.usage import Usage
from tests.unit.gateway.test_event_stream import CHAT, DONE, USED, chunk

TEXTS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(['"usage":{', "[DONE]", '{"error"', "\n\ndata: [DONE]\n\n", '"choices":[]', "\\", '"', "error"]),
)
USAGES = st.sampled_from([{}, {"usage": None}, {"usage": USED}])
EVENTS = st.lists(
    st.one_of(
        st.builds(lambda text, usage: chunk({"content": text}, **usage), TEXTS, USAGES),
        st.builds(lambda text: chunk({"content": text}, spaced=True), TEXTS),
        st.builds(lambda count: chunk(None, usage={**USED, "completion_tokens": count}), st.integers(0, 9)),
        st.sampled_from([chunk(None, usage=None), b": ping\n\n", b"\n\n", b"id: 5\nretry: 3000\n\n"]),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    events=EVENTS,
    end=st.sampled_from([b"", DONE, DONE + b": ping\n\n"]),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    withholds=st.booleans(),
)
def test_it_is_understood_as_by_a_reader_of_every_event(
    events: list[bytes], end: bytes, line_end: bytes, cuts: list[int], withholds: bool
) -> None:
    """What goes on from the first content on, the usage that was told last, and whether it ended."""
    kept, usage, has_begun = b"", None, False
    for event in events:
        data = next((line[6:] for line in event.splitlines() if line.startswith(b"data: {")), b"{}")
        read = json.loads(data)
        told = read.get("usage")
        usage = Usage(told["prompt_tokens"], told["completion_tokens"]) if told else usage
        if not (withholds and told and read["choices"] == []):
            kept += event
        has_begun |= any(choice["delta"]["content"] for choice in read.get("choices", ()))
    stream = (b"".join(events) + end).replace(b"\n", line_end)
    edges = sorted({0, *(cut for cut in cuts if cut < len(stream)), len(stream)})
    taker = EventStream(ENDPOINTS[CHAT], withholds_usage=withholds)
    output = b"".join(taker.feed(stream[a:b]) for a, b in pairwise(edges)) + taker.finish()
    assert output == ((kept + end).replace(b"\n", line_end) if has_begun else b"")
    assert (taker.usage, taker.has_ended, taker.failed) == (usage, bool(end), False)
