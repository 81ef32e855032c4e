"""The endpoints of inference: how each one names its model, ends its answers, tells its usage and is billed.

A new endpoint is a row of `ENDPOINTS`. Everything else asks the row, never for an endpoint's name.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class Billed(Enum):
    """Which tokens of an endpoint are billed.

    - `TEXT`: of the request and of the answer; where the node does not say how many, both texts are counted.
    - `INPUT`: of the request alone.
    """

    TEXT = "text"
    INPUT = "input"


class EventEnd(NamedTuple):
    """The events that end a stream, by their `type`.

    - `named`: finds such a type anywhere in an event. `last`: finds it as the last field of a large event.
    - `failed`: the type that says that the answer failed; empty if there is none.
    """

    named: re.Pattern[bytes]
    last: re.Pattern[bytes]
    failed: str = ""


class StreamStyle(NamedTuple):
    """How an endpoint streams its answer.

    - `pieces`: what precedes a piece of text in an event; each piece is about one token.
    - `end`: which events end the stream; None if `[DONE]` does.
    - `begins`: how the types of events that have content begin; `announces`: those that only announce content.
    """

    pieces: tuple[bytes, ...]
    end: EventEnd | None = None
    begins: tuple[str, ...] = ()
    announces: frozenset[str] = frozenset()


class AnswerShape(NamedTuple):
    """What a complete answer in JSON has.

    - `names`: the field with the answer, one of these. `part`: what each item of its list has; empty if it is no list.
    - `may_be_empty`: the list may have no items.
    """

    names: tuple[str, ...]
    part: str = ""
    may_be_empty: bool = False


class InferenceEndpoint(NamedTuple):
    """One endpoint.

    - `name`: its path below `/v1`, here and at nodes. It is in the job ledger.
    - `operation_id`, `example`: the operation and the example of a body in the OpenAPI document.
    - `shape`: what a right answer looks like. `stream`: how it is streamed; None if it can't be.
    - `asks_usage`: a stream tells its usage only to who asks for it by `stream_options`.
    - `has_template`: the model's chat template adds tokens to the request.
    - `has_prompts`: `prompt` may be a list of prompts, each with an answer of its own.
    """

    name: str
    operation_id: str
    example: dict[str, object]
    shape: AnswerShape
    stream: StreamStyle | None = None
    billed: Billed = Billed.TEXT
    asks_usage: bool = False
    has_template: bool = False
    has_prompts: bool = False

    @property
    def path(self) -> str:
        """The path that clients call."""
        return f"/v1/{self.name}"


def _ends(*types: str, failed: str = "") -> EventEnd:
    named = rb"(?:%b)" % b"|".join(re.escape(each).encode() for each in types)
    return EventEnd(re.compile(named + rb"\b"), re.compile(rb'"type"\s*:\s*"(' + named + rb')"\s*\}\s*$'), failed)


_MODEL = "llama-3-70b"
_SAY_HELLO = [{"role": "user", "content": "Say hello."}]
_CHAT = StreamStyle((b'content":"', b'"arguments":"'))  # also reasoning_content
_COMPLETION = StreamStyle((b'"text":"',))
_RESPONSE = StreamStyle(
    (b'"delta":"',),
    _ends("response.completed", "response.incomplete", "response.failed", failed="response.failed"),
    ("response.",),
    frozenset(
        f"response.{name}"
        for name in (
            "created",
            "queued",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_summary_part.added",
        )
    ),
)

_ROWS = (
    InferenceEndpoint(
        "chat/completions",
        "create_chat_completion",
        {"model": _MODEL, "messages": _SAY_HELLO, "stream": True},
        AnswerShape(("choices",), "message"),
        _CHAT,
        asks_usage=True,
        has_template=True,
    ),
    InferenceEndpoint(
        "completions",
        "create_completion",
        {"model": _MODEL, "prompt": "Once upon a time", "max_tokens": 16},
        AnswerShape(("choices",), "text"),
        _COMPLETION,
        asks_usage=True,
        has_prompts=True,
    ),
    InferenceEndpoint(
        "embeddings",
        "create_embeddings",
        {"model": "bge-m3", "input": "Hello"},
        AnswerShape(("data",), "embedding"),
        billed=Billed.INPUT,
    ),
    InferenceEndpoint(
        "responses",
        "create_response",
        {"model": _MODEL, "input": "Say hello."},
        AnswerShape(("output",), "type", may_be_empty=True),
        _RESPONSE,
        has_template=True,
    ),
)
ENDPOINTS = {row.name: row for row in _ROWS}
PATHS = {row.path: row for row in _ROWS}
