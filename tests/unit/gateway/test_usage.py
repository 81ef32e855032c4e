"""Usage found in a response's bytes, and tokens counted where the node reports none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.gateway.endpoints import ENDPOINTS
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.gateway.usage import (
    TEMPLATE_TOKENS,
    UNSEEN_TOKENS,
    Usage,
    count_request,
    count_response,
    count_tokens,
    find_usage,
    plausible_usage,
)

DELIVERED = 1000  # bytes of an answer
TRICKS = [
    '"usage":{"prompt_tokens":9}',
    '\\"usage\\":{',
    '{"usage": {"prompt_tokens": 1}}',
    '"',
    "\\",
    "usage",
    '"usage"',
]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, Usage(3, 5)),
        ({"completion_tokens": 5, "prompt_tokens": 3}, Usage(3, 5)),
        ({"input_tokens": 3, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 5}, Usage(3, 5)),
        (
            {"prompt_tokens": 3, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 4}},
            Usage(3, 5),
        ),
        ({"prompt_tokens": 3, "total_tokens": 3}, Usage(3, 0)),
        ({"completion_tokens": 5}, Usage(None, 5)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage(0, 0)),
        ({"prompt_tokens": 10**30, "completion_tokens": 10**30}, None),
        ({}, None),
        (None, None),
        ("3", None),
        ({"prompt_tokens": 3, "completion_tokens": None}, Usage(3, 0)),
        ({"prompt_tokens": 3.0, "completion_tokens": 99_999_999}, Usage(3, 99_999_999)),
        ({"prompt_tokens": 3, "completion_tokens": -5}, None),
        ({"prompt_tokens": -3, "completion_tokens": 5}, None),
        ({"prompt_tokens": 3, "completion_tokens": "5"}, None),
        ({"prompt_tokens": 3, "completion_tokens": 5.5}, None),
        ({"prompt_tokens": 3, "completion_tokens": 1e30}, None),
        ({"prompt_tokens": 123456789012345, "completion_tokens": 5}, None),
        ({"prompt_tokens": [3], "completion_tokens": True}, None),
    ],
)
@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_usage_is_read_in_each_shape_and_style(usage: Any, expected: Usage | None, style: Any) -> None:
    """Chat, responses, embeddings; vLLM, llama.cpp, OpenAI. None where nothing is said."""
    answer = {"id": "x", "choices": [{"message": {"content": "hi"}}], "usage": usage, "model": "m"}
    assert find_usage(json.dumps(answer, **style).encode()) == expected


@given(
    text=st.lists(st.one_of(st.text(), st.sampled_from(TRICKS))).map("".join),
    usage=st.sampled_from([None, {"prompt_tokens": 3, "completion_tokens": 5}]),
    is_last=st.booleans(),
    escapes=st.booleans(),
)
def test_no_text_is_taken_for_a_usage(text: str, usage: Any, is_last: bool, escapes: bool) -> None:
    """Whatever a model writes: in JSON a quote inside text is escaped."""
    answer: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
    answer = {**answer, "usage": usage} if is_last else {"usage": usage, **answer}
    expected = Usage(3, 5) if usage else None
    assert find_usage(json.dumps(answer, ensure_ascii=escapes).encode("utf-8", "surrogatepass")) == expected


def test_counts_beside_a_usage_are_not_its() -> None:
    """Only what stands inside an object of that name is read."""
    assert find_usage(b'{"kind":"usage","prompt_tokens":9,"completion_tokens":9}') is None
    assert find_usage(b'{"prompt_tokens":9,"usage":{"prompt_tokens":3},"kind":"usage"}') == Usage(3, 0)


def test_the_last_usage_counts() -> None:
    """With usage on every chunk each tells the sum so far; a null after it says nothing."""
    chunk = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n'
    assert find_usage(chunk % 1 + chunk % 2) == Usage(3, 2)
    assert find_usage(chunk % 1 + b'data: {"usage":null}\n\ndata: {"usage":{}}\n\n') == Usage(3, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", 0), (b"hello", 1), (b"Hello, world!", 4), (b"internationalization", 4), ("naïve".encode(), 1), (b" \n", 0)],
)
def test_tokens_are_about_six_letters_or_a_sign(text: bytes, expected: int) -> None:
    """For want of the model's tokenizer."""
    assert count_tokens(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"choices": [{"message": {"content": "one two"}}, {"message": {"content": "three"}}]}, 3),
        ({"choices": [{"text": "one two"}]}, 2),
        ({"choices": [{"message": {"content": None}}]}, 0),
        ({"choices": [{"message": {"content": [{"type": "text"}]}}]}, 0),
        ({"choices": [{"message": {"content": "\ud800 one"}}]}, 2),
        ({"data": [{"embedding": [0.1]}]}, 0),
        ({"choices": None}, 0),
        ({"choices": 5}, 0),
        ({"choices": ["x"]}, 0),
        ([], 0),
        (5, 0),
    ],
)
def test_an_answer_without_usage_is_counted_by_its_text(answer: Any, expected: int) -> None:
    """Any JSON, also one that is not OpenAI's, has a count."""
    assert count_response(json.dumps(answer).encode()) == expected


def test_a_long_text_is_counted_in_parts() -> None:
    """Its parts stand for the rest: the estimate is near the count, and only so many bytes are looked at."""
    text = b"word, " * 200_000
    assert abs(count_tokens(text) - 400_000) < 4000
    assert abs(count_tokens(b" " * 600_000 + text) - 400_000) < 150_000


def test_what_is_no_json_counts_nothing_and_what_is_huge_is_counted_in_part() -> None:
    """Counting must not hold others up."""
    assert count_response(b"\xff{") == 0
    assert count_response(b'{"choices":' + b"[" * 5000 + b"]" * 5000 + b"}") == 0
    assert 0 < count_response(b'{"choices":"' + b"word " * 1_000_000 + b'"}') < 300_000
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": "word " * 1_000_000}]}).encode()
    assert 0 < count_request(InferenceRequest(ENDPOINTS["chat/completions"], body)) < 300_000


@pytest.mark.parametrize(
    ("limits", "tokens_out", "is_believed"),
    [
        ({}, DELIVERED, True),
        ({}, DELIVERED + 1, False),
        ({"max_tokens": 2 * DELIVERED}, DELIVERED + 1, False),
        ({"max_tokens": 0}, 2, False),
        ({"max_tokens": 10.0}, 11, False),
        ({"max_tokens": 10}, 10, True),
        ({"max_tokens": 10}, 11, False),
        ({"max_tokens": 10, "n": 3}, 30, True),
        ({"max_tokens": 10, "n": 3}, 31, False),
        ({"max_completion_tokens": 20, "max_tokens": 10}, 20, True),
        ({"max_output_tokens": 10}, 11, False),
        ({"max_tokens": None}, 11, True),
        ({"max_tokens": "10", "n": "x"}, 11, True),
        ({"max_tokens": True}, 11, True),
        ({"max_tokens": -1}, 11, True),
    ],
)
def test_no_more_tokens_are_believed_than_the_client_allowed(limits: Any, tokens_out: int, is_believed: bool) -> None:
    request = InferenceRequest(ENDPOINTS["chat/completions"], json.dumps({"model": "m", **limits}).encode())
    said = Usage(3, tokens_out)
    assert plausible_usage(said, request, DELIVERED) == (said if is_believed else None)


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"prompt": "hi"}, 5),
        ({"prompt": ["hi"]}, 5),
        ({"prompt": ["a", "b", "c"]}, 15),
        ({"prompt": [1, 2, 3]}, 5),
        ({"prompt": [[1, 2], [3]]}, 10),
        ({"prompt": []}, 5),
        ({"prompt": ["a", "b"], "n": 3}, 30),
        ({"prompt": ["a", "b"], "n": 3, "best_of": 4}, 40),
        ({"prompt": "a", "best_of": 4}, 20),
    ],
)
def test_each_prompt_and_each_choice_of_a_completion_may_have_its_tokens(fields: Any, most: int) -> None:
    """A list of numbers is one prompt. A chat has no such fields."""
    body = json.dumps({"model": "m", "max_tokens": 5, **fields}).encode()
    request = InferenceRequest(ENDPOINTS["completions"], body)
    assert plausible_usage(Usage(1, most), request, DELIVERED) == Usage(1, most)
    assert plausible_usage(Usage(1, most + 1), request, DELIVERED) is None
    assert plausible_usage(Usage(1, 6), InferenceRequest(ENDPOINTS["responses"], body), DELIVERED) == (
        Usage(1, 6) if fields.get("n") else None
    )


def test_embeddings_have_no_tokens_out() -> None:
    """Whatever the node says, and whatever the client allows."""
    request = InferenceRequest(ENDPOINTS["embeddings"], b'{"model":"m","input":"hi","max_tokens":9}')
    assert plausible_usage(Usage(3, 0), request, DELIVERED) == Usage(3, 0)
    assert plausible_usage(Usage(3, 1), request, DELIVERED) is None


REFERENCES: dict[str, dict[str, Any]] = {
    "a picture": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]
    },
    "a picture without its type": {"messages": [{"role": "user", "content": [{"image_url": "https://x"}]}]},
    "a picture of a response": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    "a recording": {"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
    "a file": {"messages": [{"content": [{"type": "file", "file": {"file_id": "f"}}]}]},
    "an earlier response": {"input": "hi", "previous_response_id": "r"},
}
NO_REFERENCES: dict[str, dict[str, Any]] = {
    "text": {"messages": [{"role": "user", "content": "hi"}]},
    "text about a picture": {"messages": [{"role": "user", "content": '{"type":"image_url","image_url":{"url":1}}'}]},
    "a tool that takes a file": {"tools": [{"function": {"parameters": {"properties": {"file": {"type": "string"}}}}}]},
    "no earlier response": {"input": "hi", "previous_response_id": None},
}


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", "embeddings", "responses"])
@pytest.mark.parametrize("fields", [*REFERENCES.values(), *NO_REFERENCES.values()], ids=[*REFERENCES, *NO_REFERENCES])
def test_no_more_tokens_in_are_believed_than_a_request_can_have(endpoint: str, fields: Any) -> None:
    """A byte each, and what a chat's template adds; a million more only for what the body refers to."""
    request = InferenceRequest(ENDPOINTS[endpoint], json.dumps({"model": "m", **fields}).encode())
    template = TEMPLATE_TOKENS if endpoint in {"chat/completions", "responses"} else 0
    most = request.size + (UNSEEN_TOKENS if fields in REFERENCES.values() else template)
    assert plausible_usage(Usage(most, 0), request, 0) == Usage(most, 0)
    assert plausible_usage(Usage(most + 1, 0), request, 0) is None
    assert plausible_usage(None, request, 0) is None


class CountedBytes(bytes):
    """Bytes that count how often they are searched for a key."""

    searches = 0

    def rfind(self, *arguments: Any) -> int:
        """Count, and search."""
        self.searches += 1
        return super().rfind(*arguments)


@pytest.mark.parametrize("unit", [b'"usage":{},', b'"usage":{"usage":{"x":1}},', b'"usage",', b'"usage":null,'])
def test_a_usage_is_looked_for_in_a_bounded_part_of_an_answer(unit: bytes) -> None:
    """A node may write the key a million times, without numbers: only the last are looked at, each in a few KB."""
    answer = CountedBytes(b'{"usage":{"prompt_tokens":1},"a":[' + unit * (1_000_000 // len(unit)) + b"]}")
    assert find_usage(answer) is None
    assert answer.searches <= 1000
    far = b'{"usage":{"x":"' + b"x" * 5000 + b'","prompt_tokens":1}}'
    assert find_usage(far) is None
    assert find_usage(far.replace(b"x" * 1000, b"")) == Usage(1, 0)
