"""A node's stream on its way to the client: complete events, usage withheld if only we asked, its end recognised."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import pytest

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.event_stream import MAX_EVENT_BYTES, EventStream, add_cost
from lucid_compute.gateway.usage import Usage

CHAT = "chat/completions"
DONE = b"data: [DONE]\n\n"
USED = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Seen(NamedTuple):
    """What came out of a stream, and what it was understood to say."""

    output: bytes
    has_ended: bool
    failed: bool
    is_refused: bool
    usage: Usage | None
    pieces: int


def chunk(delta: dict[str, Any] | None, *, spaced: bool = False, end: bytes = b"\n\n", **fields: Any) -> bytes:
    """An event of a chat; `delta` None is the one with the usage, which has no choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    body = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **fields}
    return b"data: " + json.dumps(body, separators=(", ", ": ") if spaced else (",", ":")).encode() + end


def text(content: str | None, **fields: Any) -> bytes:
    """An event with a piece of text."""
    return chunk({"content": content}, **fields)


def response(kind: str, **fields: Any) -> bytes:
    """An event of `/v1/responses`, as OpenAI writes them."""
    body = json.dumps({"type": kind, "sequence_number": 1, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {body}\n\n".encode()


def pass_on(*blocks: bytes, endpoint: str = CHAT, withholds: bool = True) -> Seen:
    """Pass the blocks on, as the gateway does."""
    stream = EventStream(ENDPOINTS[endpoint], withholds_usage=withholds)
    output = b""
    for block in blocks:
        output += stream.feed(block)
        if stream.has_ended or stream.failed:
            break
    else:
        output += stream.finish()
    return Seen(output, stream.has_ended, stream.failed, stream.is_refused, stream.usage, stream.pieces)


AFTER = b": goodbye, and have a very nice day, all of you\n\n"
ROLE = chunk({"role": "assistant", "content": ""})
OPENAI = ROLE + text("Hel") + text("lo") + chunk({}) + chunk(None, usage=USED) + DONE
STREAMS = {
    "openai": OPENAI,
    "openai, null on every chunk": b"".join(
        [
            chunk({"role": "assistant", "content": ""}, usage=None),
            text("Hel", usage=None),
            text("lo", usage=None),
            chunk(None, usage=USED),
            DONE,
        ]
    ),
    "crlf": OPENAI.replace(b"\n", b"\r\n"),
    "crlf between, lf within": OPENAI.replace(b"\n\n", b"\n\r\n"),
    "vllm, several tokens a chunk, usage on every one": ROLE
    + text(" one two three", usage={**USED, "completion_tokens": 3})
    + text(" four", usage={**USED, "completion_tokens": 4})
    + chunk(None, usage={**USED, "completion_tokens": 4})
    + DONE,
    "llama.cpp": chunk({"role": "assistant", "content": None})
    + text("Hel")
    + text("lo")
    + chunk({})
    + chunk(None, usage=USED, timings={"prompt_n": 3, "predicted_ms": 1.5})
    + DONE,
    "tgi": b"".join(
        event.replace(b"data: ", b"data:") for event in (ROLE, text("Hel"), text("lo"), chunk(None, usage=USED), DONE)
    ),
    "spaced json": chunk({"role": "assistant", "content": ""}, spaced=True)
    + text("Hel", spaced=True)
    + text("lo", spaced=True)
    + chunk(None, spaced=True, usage=USED)
    + DONE,
    "comments": b": welcome\n\n" + OPENAI.replace(b"\n\ndata", b"\n\n: ping - 2026\n\ndata"),
    "no end": ROLE + text("Hel"),
    "end without a blank line": OPENAI[:-2],
    "something after the end": OPENAI + AFTER,
    "fails at once": b'data: {"error":{"message":"out of memory","code":500}}\n\n' + DONE,
    "fails": ROLE + text("Hel") + b'data: {"error": {"message": "out of memory"}}\n\n' + DONE,
    "refuses": b'data: {"error":{"message":"too long","code":400}}\n\n',
}
RESPONSES = {
    end: response("response.created", response={"status": "in_progress", "error": None, "usage": None})
    + response("response.output_text.delta", delta="Hel")
    + response("response.output_text.delta", delta="lo")
    + response(f"response.{end}", response={"status": end, "usage": {"input_tokens": 3, "output_tokens": 2}})
    for end in ("completed", "incomplete", "failed")
}
EVERY = [*((CHAT, stream) for stream in STREAMS.values()), *(("responses", stream) for stream in RESPONSES.values())]


@pytest.mark.parametrize(("endpoint", "stream"), EVERY, ids=[*STREAMS, *RESPONSES])
@pytest.mark.parametrize("withholds", [True, False])
def test_it_does_not_matter_how_a_stream_is_cut_into_blocks(endpoint: str, stream: bytes, withholds: bool) -> None:
    """In two at every byte, and byte by byte: what comes out is the same as of the whole."""
    whole = pass_on(stream, endpoint=endpoint, withholds=withholds)
    in_two = [[stream[:at], stream[at:]] for at in range(len(stream))]
    for blocks in [*in_two, [bytes([byte]) for byte in stream]]:
        seen = pass_on(*blocks, endpoint=endpoint, withholds=withholds)
        assert seen[1:] == whole[1:]
        assert seen.output == whole.output or whole.output == seen.output + AFTER


@pytest.mark.parametrize("name", STREAMS)
def test_without_our_question_every_event_goes_on_as_it_came(name: str) -> None:
    """Except a fault of the node, and an event that was never completed."""
    stream = STREAMS[name]
    seen = pass_on(stream, withholds=False)
    if name == "end without a blank line":
        assert seen.output == stream + b"\n\n"
    elif seen.failed:
        assert stream.startswith(seen.output)
        assert b"error" not in seen.output
    else:
        assert seen.output == stream


@pytest.mark.parametrize("name", STREAMS)
def test_the_answer_to_our_question_is_withheld_and_nothing_else(name: str) -> None:
    """Every event but the one with a usage and no choices; and what it says is known."""
    seen, all_of_it = pass_on(STREAMS[name]), pass_on(STREAMS[name], withholds=False)
    events = re.findall(rb".*?\n\r?\n", all_of_it.output, re.DOTALL)
    assert seen.output == b"".join(event for event in events if not re.search(rb'"choices": ?\[\]', event))
    assert seen[1:] == all_of_it[1:]
    if "usage" in name or "openai" in name:
        assert seen.usage in {Usage(3, 2), Usage(3, 4)}
        assert b"[DONE]" in seen.output


@pytest.mark.parametrize(
    ("name", "has_ended", "failed", "is_refused", "pieces"),
    [
        ("openai", True, False, False, 2),
        ("llama.cpp", True, False, False, 2),
        ("tgi", True, False, False, 2),
        ("spaced json", True, False, False, 2),
        ("comments", True, False, False, 2),
        ("no end", False, False, False, 1),
        ("end without a blank line", True, False, False, 2),
        ("something after the end", True, False, False, 2),
        ("fails at once", False, True, False, 0),
        ("fails", False, True, False, 1),
        ("refuses", True, False, True, 0),
    ],
)
def test_how_a_stream_ended_is_known(name: str, has_ended: bool, failed: bool, is_refused: bool, pieces: int) -> None:
    """Return whether the node said that it is done, that it can't, or that the request is at fault."""
    assert pass_on(STREAMS[name])[1:4] == (has_ended, failed, is_refused)
    assert pass_on(STREAMS[name]).pieces == pieces


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"m"}}\n\n',
        b'data: { "error" : "Request failed during generation" , "error_type":"generation"}\n\n',
        b'data:{"error":"Request failed during generation","error_type":"generation"}\n\n',
        b'data: {"object":"error","message":"m","type":"InternalServerError","code":500}\n\n',
        b'error: {"code":500,"message":"m","type":"server_error"}\n\n',
        b'event: error\ndata: {"message":"m"}\n\n',
        b'event: error\r\ndata: {"message":"m"}\r\n\r\n',
        b': ping\n\ndata: {"error":{"message":"m"}}\n\n',
    ],
)
@pytest.mark.parametrize("before", [b"", ROLE + text("Hel")])
def test_a_fault_is_recognised_in_every_runtimes_words(event: bytes, before: bytes) -> None:
    """vLLM, SGLang, llama.cpp and its forks, TGI, FastChat: what came before it goes on, and it does not."""
    seen = pass_on(before + event + DONE)
    assert (seen.failed, seen.has_ended) == (True, False)
    assert seen.output == (before and before + (b": ping\n\n" if event.startswith(b":") else b""))


@pytest.mark.parametrize(
    "content",
    [
        '"usage":{"prompt_tokens":99}',
        '"choices":[]',
        '"choices":[],"usage":{"prompt_tokens":99,"completion_tokens":9}',
        "data: [DONE]",
        "\ndata: [DONE]\n\n",
        '\n\ndata: {"error":{"message":"m","code":400}}\n\n',
        '{"error":',
        '{"error": {',
        "event: error\n",
        '\nerror: {"code":500}',
        '"type":"response.completed"',
        '\n"type": "response.failed"',
        "response.completed",
    ],
)
@pytest.mark.parametrize(("endpoint", "key"), [(CHAT, "content"), ("responses", "delta")])
def test_no_text_of_a_model_is_taken_for_what_it_says(content: str, endpoint: str, key: str) -> None:
    """Inside JSON quotes are escaped and lines have no end: text looks like none of it, also as a tool's arguments."""
    deltas: list[dict[str, Any]] = [
        {"content": content},
        {"tool_calls": [{"function": {"arguments": content}}]},
        {"role": content},
    ]
    event = (
        b"".join(chunk(each) for each in deltas)
        if key == "content"
        else response("response.output_text.delta", delta=content)
    )
    seen = pass_on(event, endpoint=endpoint)
    assert seen[:5] == (event, False, False, False, None)


@pytest.mark.parametrize(
    ("end", "has_ended", "failed"), [("completed", True, False), ("incomplete", True, False), ("failed", False, True)]
)
def test_a_response_ends_with_its_last_event_and_without_done(end: str, has_ended: bool, failed: bool) -> None:
    """What OpenAI's reference names; usage is told in it, and is the client's to see."""
    seen = pass_on(RESPONSES[end], endpoint="responses")
    assert (seen.has_ended, seen.failed, seen.usage, seen.pieces) == (has_ended, failed, Usage(3, 2), 2)
    assert (b'"usage":{' in seen.output) is has_ended
    reordered = b'data: {"response":{},"sequence_number":9,"type":"response.%b"}\n\n' % end.encode()
    assert pass_on(reordered, endpoint="responses")[1:3] == (has_ended, failed)


@pytest.mark.parametrize("event", [response("error", code="server_error", message="m"), STREAMS["fails at once"]])
def test_a_response_that_tells_of_an_error_failed(event: bytes) -> None:
    """`error` may come at any time."""
    begun = response("response.created", response={"error": None}) + response("response.output_text.delta", delta="a")
    assert pass_on(event, endpoint="responses")[:3] == (b"", False, True)
    assert pass_on(begun + event, endpoint="responses")[:3] == (begun, False, True)


def test_a_response_that_breaks_off_has_not_ended() -> None:
    """Nor has one whose text speaks of the end."""
    for at in range(len(RESPONSES["completed"])):
        assert not pass_on(RESPONSES["completed"][:at], endpoint="responses").has_ended


def test_an_event_may_have_so_many_bytes_and_no_more() -> None:
    """Whether it comes in large blocks or in small ones. It is no failure of the node's."""
    large = text("x" * (MAX_EVENT_BYTES - 1000))
    for size in (10_000, 65536, len(large)):
        blocks = [large[at : at + size] for at in range(0, len(large), size)]
        assert pass_on(*blocks, DONE).output == large + DONE
    stream = EventStream(ENDPOINTS[CHAT], withholds_usage=True)
    for _ in range(MAX_EVENT_BYTES // 1024):
        assert stream.feed(b"x" * 1024) == b""
    with pytest.raises(EgressFault) as caught:
        stream.feed(b"x")
    assert caught.value.kind is FaultKind.TOO_LARGE
    small = EventStream(ENDPOINTS[CHAT], withholds_usage=True, max_event_bytes=100)
    assert small.feed(b"\n" + b"x" * 99) == b""
    with pytest.raises(EgressFault):
        small.feed(b"x")


WITH_ERROR = chunk({"content": "c"}, error={"message": "m", "code": 500})
UNUSUAL = {
    "an error": WITH_ERROR,
    "an error that looks like text": text("c").replace(b'"c"', b'"c"},"finish_reason":null}],"error":{"a":"b"'),
    "a usage": text("c", usage=USED),
    "its end": text("c").replace(b"null", b'"stop"'),
    "two texts": text("c") + text("d"),
    "words of ours": text('say "error": "usage": {}, then \n\ndata: [DONE]\n\n, and end with a \\'),
    "the end on a line of its own": text("c")[:-1] + DONE,
    "nothing": text(""),
}


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("event", UNUSUAL.values(), ids=UNUSUAL)
def test_an_event_among_usual_ones_is_read_as_it_is_among_others(event: bytes, *, spaced: bool) -> None:
    """However many events came before which differ only in their text."""
    begin = chunk({"role": "assistant", "content": ""}, spaced=spaced) + text("a", spaced=spaced)
    usual = [text(str(number), spaced=spaced) for number in range(40)]
    assert pass_on(begin, *usual, event) == pass_on(b"".join([begin, *usual, event]))


def test_a_stream_whose_events_differ_is_learnt_from_a_few_times_only() -> None:
    """Its pieces are counted all the same."""
    stream = EventStream(ENDPOINTS[CHAT], withholds_usage=True)
    for number in range(100):
        stream.feed(text("a", created=number))
    assert stream.pieces == 100
    assert stream._usual_learnt == 16


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_the_cost_stands_in_the_usage_without_choices_alone(spaced: bool, end: bytes) -> None:
    """Exact, once, also if the node named another; all else of the stream keeps its meaning, and most its bytes."""
    told = chunk(None, usage={**USED, "cost": 9, "\x00": "\x00"}, spaced=spaced, end=end)
    others = [text('"usage":{', usage=USED), b": ping\n\n", chunk(None, usage=None), chunk(None, usage=5), DONE]
    before, after = b"".join(others[:2]), b"".join(others[2:])
    output = add_cost(before + told + after, "0.000000000015")
    assert output.startswith(before)
    assert output.endswith(after)
    event = output.removeprefix(before).removesuffix(after)
    assert event.endswith(end)
    value = json.loads(event.removeprefix(b"data: "))
    assert event.count(b'"cost":0.000000000015}}') == event.count(b"cost") == 1
    assert value["usage"] == {**USED, "\x00": "\x00", "cost": 1.5e-11}
    assert {**value, "usage": 0} == {**json.loads(told.removeprefix(b"data: ")), "usage": 0}


@pytest.mark.parametrize(
    "block", [b'data: {"usage"', b"data: [1]\n\n", b'data: {"choices":[],"usage":{}\n\n', b"\n\n", b""]
)
def test_what_is_no_usage_is_left_alone(block: bytes) -> None:
    assert add_cost(block, "1") == block
