"""A large body is read in steps: what a node gets is the same as of a small one, and no step is long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.body_scan import STEP_BYTES, STEP_TOKENS, BodyScan
from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.request_body import PARSED_BYTES, InferenceRequest, read_in_steps
from tests.unit.gateway.test_request_body import ASKS, CHAT, RICH, bodies

SIZE = 1024 * 1024


def read(body: bytes, endpoint: str = CHAT) -> InferenceRequest:
    """Return the request of a body that is read in steps."""
    return asyncio.run(_read(read_in_steps(ENDPOINTS[endpoint], body)))


async def _read(request: Awaitable[InferenceRequest]) -> InferenceRequest:
    return await request


@settings(max_examples=300, deadline=None)
@given(body=bodies(), target=st.sampled_from(["a", "b", 'quoted "b"', "ünï"]))
@example(body=b'{"mod\\u0065l":"a","m":{"model":"a"}}', target="b")
@example(body=b'{"a":[],"model":"a","lucid":{},"stream":true}', target="b")
@example(body=b'{"lucid":{},"model":"a"}', target="b")
@example(body=b'{"model":"a" , "x":"," }', target="b")
@example(body=RICH, target="b")
def test_a_large_body_becomes_what_a_small_one_becomes(body: bytes, target: str) -> None:
    """But for the order of its fields."""
    plain, stepped = InferenceRequest(ENDPOINTS[CHAT], body), read(body)
    for name in ("model", "session", "is_stream", "policy", "adds_usage", "choice_count", "max_tokens_out"):
        assert getattr(plain, name) == getattr(stepped, name)
    for asks_usage in (True, False):
        expected = plain.body_for(target, asks_usage=asks_usage)
        assert json.loads(stepped.body_for(target, asks_usage=asks_usage)) == json.loads(expected)
    assert stepped.refers_to_unseen == plain.refers_to_unseen


def test_our_question_is_taken_back_to_what_the_client_wrote() -> None:
    """Also where the client sent the field, and in a body of any size."""
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False, "x": 1}}):
        body = json.dumps({"model": "a", "stream": True, **options, "x": [1]}).encode()
        for request in (InferenceRequest(ENDPOINTS[CHAT], body), read(body)):
            assert json.loads(request.body_for("b"))["stream_options"]["include_usage"] is True
            unasked = json.loads(request.body_for("b", asks_usage=False))
            assert unasked == {"model": "b", "stream": True, **options, "x": [1]}
            assert json.loads(request.body_for("b"))["stream_options"] == {
                **(options.get("stream_options") or {}),
                **ASKS,
            }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"not json", 400),
        (b"{'model':'a'}", 400),
        (b'{"model":"a",}', 400),
        (b'{"model":"a"} x', 400),
        (b'{"model":"a"}{"model":"b"}', 400),
        (b'{"model":"a","x":"\xff"}', 400),
        (b'{"model":"a","x":"\xe2\x82', 400),
        (b'{"model":"a","x":"\n"}', 400),
        (b'{"model":"a","x":"y}', 400),
        (b'{"model":"a","x":"y\\', 400),
        (b'{"model":"a","x":[1,2}', 400),
        (b'{"model":"a","x":[1,2', 400),
        (b'{"model":"a","x":NaN}', 400),
        (b'{"model":"a","x":[1,{"y":-Infinity}]}', 400),
        (b'{"model":"a","x":}', 400),
        (b'{"model":"a" "x":1}', 400),
        (b'{"model":"a","x":' + b"[" * 250 + b"]" * 250 + b"}", 400),
        (b'{"model":"a","x":' + b"[" * 250, 400),
        (b"[]", 422),
        (b'"text"', 422),
        (b"{}", 422),
        (b'{"model":5}', 422),
        (b'{"model":"a","model":"b"}', 422),
        (b'{"model":"a","x":[[["y"]]],"mod\\u0065l":"b"}', 422),
        (b'{"model":"a","lucid":{"x":1}}', 422),
        (b'{"model":"a","stream_options":{"include_usage":1,"include_usage":2}}', 422),
        (b'{"model":"a","user":"' + b"x" * PARSED_BYTES + b'"}', 422),
        (b'{"model":"a","stream_options":{"z":0,"z":1' + b',"k":[]' * 20_000 + b"}}", 422),
        (b'{"model":"a"' + b',"\\u0061":0' * 10_001 + b"}", 422),
    ],
)
def test_what_is_refused_of_a_small_body_is_refused_of_a_large_one(body: bytes, status: int) -> None:
    """With the same status."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.http_status == status
    assert len(caught.value.details["fields"]) == 1


@pytest.mark.parametrize("prompt", ['""', "[1]"])
def test_megabytes_of_prompts_are_counted_in_steps(prompt: str) -> None:
    """To the last one; a body whose field has another name takes fewer steps."""
    number = 3 * SIZE // len(prompt)
    prompts = ",".join([prompt] * number)
    turns = {}
    for name in ("prompt", "xxxxxx"):
        body = f'{{"model":"a","max_tokens":7,"{name}":[{prompts}]}}'.encode()

        async def count_turns(name: str, body: bytes) -> InferenceRequest:
            reading = asyncio.create_task(_read(read_in_steps(ENDPOINTS["completions"], body)))
            turns[name] = 0
            while not reading.done():
                turns[name] += 1
                await asyncio.sleep(0)
            return reading.result()

        request = asyncio.run(count_turns(name, body))
        assert request.max_tokens_out == 7 * (number if name == "prompt" else 1)
    assert turns["prompt"] >= turns["xxxxxx"] + 3


@pytest.mark.parametrize(
    ("prompt", "count"),
    [('"hi"', 1), ("[]", 1), ('["a"]', 1), ('["a","b","c"]', 3), ("[1,2,3]", 1), (" [ [1,2] , [3] ]", 2), ("null", 1)],
)
def test_the_prompts_of_a_large_body_are_counted(prompt: str, count: int) -> None:
    """Or more are thought possible, but never fewer."""
    body = f'{{"model":"a","max_tokens":7,"prompt":{prompt},"n":2}}'.encode()
    for request in (read(body, "completions"), InferenceRequest(ENDPOINTS["completions"], body)):
        assert (request.choice_count, request.max_tokens_out) == (2 * count, 14 * count)
        assert json.loads(request.body_for("a")) == json.loads(body)


def filled(unit: bytes, begin: bytes = b'{"model":"m","x":[0', end: bytes = b"]}") -> bytes:
    """Return a body that repeats `unit` up to a megabyte."""
    return begin + unit * ((SIZE - len(begin) - len(end)) // len(unit)) + end


ADVERSARIAL = {
    "numbers": filled(b",0"),
    "lists": filled(b",[]"),
    "deep lists": filled(b",[[[[]]]]"),
    "objects": filled(b',{"":{}}'),
    "text": filled(b"x", b'{"model":"m","x":"', b'"}'),
    "escapes": filled(b'\\n\\"', b'{"model":"m","x":"', b'"}'),
    "short texts": filled(b',""'),
    "texts with brackets": filled(b',"[{\\""'),
    "texts longer than a step": filled(b',"' + b"a" * (STEP_BYTES + 1) + b'"'),
    "keys": filled(b',"k":0', b'{"model":"m"', b"}"),
    "keys with lists": filled(b',"k":[[[]]]', b'{"model":"m"', b"}"),
    "an escape and keys": filled(b',"k":0', b'{"mod\\u0065l":"m","lucid":{}', b"}"),
    "white space": filled(b" "),
    "brackets that never close": filled(b'"[",', b'{"model":"m","x":' + b"[" * 190, b"]" * 190 + b"}"),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_step_looks_at_much(name: str) -> None:
    """Of bytes, or of tokens in Python: whatever a body of the largest size holds, others are served in between."""
    body = ADVERSARIAL[name]
    looks = [0]

    class Counted(BodyScan):
        def _match(self, pattern: Any) -> int:
            looks[-1] += 1
            return super()._match(pattern)

    scan = Counted(body, ("model", "lucid"))
    at = furthest = 0
    for _ in scan.steps():
        furthest, at = max(furthest, scan._at - at), scan._at
        looks.append(0)
    assert furthest <= 3 * STEP_BYTES
    assert max(looks) <= 5 * STEP_TOKENS
    assert (scan._at, scan.members[0].name) == (len(body), "model")
