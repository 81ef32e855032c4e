"""The endpoints of inference: how each one names its model, ends its answers, tells its usage and is billed.

A new endpoint is a row of `ENDPOINTS`, or of `STORED` if it names a stored response. Everything else asks the row,
never for an endpoint's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from lucid_compute.errors import endpoint_path


class Billed(Enum):
    """Which tokens of an endpoint are billed.

    - `TEXT`: of the request and of the answer; where the node does not say how many, both texts are counted.
    - `INPUT`: of the request alone.
    - `SAID`: of the request, and of the answer those that the node tells of: it has no text to count.
    - `NOTHING`: the node generates and embeds nothing.
    """

    TEXT = "text"
    INPUT = "input"
    SAID = "said"
    NOTHING = "nothing"


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
    - `input_usage`: marks an event whose usage is of the input alone; the output's comes later. Empty if there is none.
    - `takes_done`: `[DONE]` ends the stream, too.
    """

    pieces: tuple[bytes, ...]
    end: EventEnd | None = None
    begins: tuple[str, ...] = ()
    announces: frozenset[str] = frozenset()
    input_usage: bytes = b""
    takes_done: bool = True


class AnswerShape(NamedTuple):
    """What a complete answer has.

    - `names`: the field with the answer, one of these. `part`: what each item of its list has; empty if it is no list.
    - `may_be_empty`: the list may have no items. `may_be_list`: some nodes send the list without an object around it.
    - `media`: how the types of media begin that are passed on as they are, beside JSON or instead of it.
    """

    names: tuple[str, ...]
    part: str = ""
    may_be_empty: bool = False
    may_be_list: bool = False
    media: tuple[bytes, ...] = ()


class InferenceEndpoint(NamedTuple):
    """One endpoint.

    - `name`: its path below `/v1`, here and at nodes; one with a slash in front is at the top. It is in the job ledger.
    - `operation_id`, `example`: the operation and the example of a body in the OpenAPI document.
    - `shape`: what a right answer looks like. `stream`: how it is streamed; None if it can't be.
    - `asks_usage`: a stream tells its usage only to who asks for it by `stream_options`.
    - `has_template`: the model's chat template adds tokens to the request.
    - `has_prompts`: `prompt` may be a list of prompts, each with an answer of its own.
    - `is_form`: the body is a form in several parts, one of which is `model`.
    - `counts_cached`: its usage tells the cached part of the input apart.
    - `headers`: further ones for nodes. `{key}` stands for the node's key; without one the header is left out.
    - `stores`: a node may keep the answer, under an id that leads back to this node.
    - `is_stored`: its path names such an answer, in place of a model in its body.
    """

    name: str
    operation_id: str
    example: Mapping[str, object]
    shape: AnswerShape
    stream: StreamStyle | None = None
    billed: Billed = Billed.TEXT
    asks_usage: bool = False
    has_template: bool = False
    has_prompts: bool = False
    is_form: bool = False
    counts_cached: bool = False
    headers: tuple[str, ...] = ()
    method: str = "POST"
    stores: bool = False
    is_stored: bool = False

    @property
    def path(self) -> str:
        """The path that clients call."""
        return endpoint_path(self.name)


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

_MESSAGE = StreamStyle(
    (b'_delta","text":"', b'_delta","partial_json":"', b'_delta","thinking":"'),
    _ends("message_stop"),
    ("content_block_", "message_"),
    frozenset({"message_start", "content_block_start"}),
    input_usage=b'"message_start"',
    takes_done=False,
)
_ANTHROPIC = ("anthropic-version: 2023-06-01", "x-api-key: {key}")  # which Anthropic's own API wants
_RERANKER = "bge-reranker-v2-m3"
_RERANK = {"model": _RERANKER, "query": "What is a node?", "documents": ["A GPU that serves models.", "A bird."]}
_RANKS = AnswerShape(("results",), "index", may_be_list=True)

# OpenAI's events; vLLM sends those of a chat.
_TRANSCRIPT = StreamStyle((b'content":"', b'"delta":"'), _ends("transcript.text.done"), ("transcript.text.",))
_TEXT_MEDIA = (b"text/plain", b"text/vtt", b"text/srt", b"application/x-subrip")
_WHISPER = {"model": "whisper-large-v3", "file": "speech.wav"}

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
        stores=True,
    ),
    InferenceEndpoint(
        "messages",
        "create_message",
        {"model": _MODEL, "max_tokens": 64, "messages": _SAY_HELLO},
        AnswerShape(("content",), "type", may_be_empty=True),
        _MESSAGE,
        has_template=True,
        counts_cached=True,
        headers=_ANTHROPIC,
    ),
    InferenceEndpoint(
        "messages/count_tokens",
        "count_message_tokens",
        {"model": _MODEL, "messages": _SAY_HELLO},
        AnswerShape(("input_tokens",)),
        billed=Billed.NOTHING,
        headers=_ANTHROPIC,
    ),
    InferenceEndpoint("rerank", "rerank", _RERANK, _RANKS, billed=Billed.INPUT),
    InferenceEndpoint("/v2/rerank", "rerank_v2", _RERANK, _RANKS, billed=Billed.INPUT),
    InferenceEndpoint(
        "score",
        "create_score",
        {"model": _RERANKER, "text_1": "What is a node?", "text_2": "A GPU that serves models."},
        AnswerShape(("data", "scores")),
        billed=Billed.INPUT,
    ),
    InferenceEndpoint(
        "/tokenize",
        "tokenize",
        {"model": _MODEL, "prompt": "Say hello."},
        AnswerShape(("tokens",)),
        billed=Billed.NOTHING,
    ),
    InferenceEndpoint(
        "/detokenize",
        "detokenize",
        {"model": _MODEL, "tokens": [46864, 24748, 13]},
        AnswerShape(("prompt", "content", "text")),
        billed=Billed.NOTHING,
    ),
    InferenceEndpoint(
        "audio/speech",
        "create_speech",
        {"model": "kokoro-82m", "input": "Say hello.", "voice": "af_heart"},
        AnswerShape((), media=(b"audio/", b"application/octet-stream")),
        billed=Billed.INPUT,
    ),
    InferenceEndpoint(
        "images/generations",
        "create_image",
        {"model": "flux-1-schnell", "prompt": "A node that sends a heartbeat", "size": "1024x1024"},
        AnswerShape(("data",)),
        billed=Billed.SAID,
    ),
    InferenceEndpoint(
        "audio/transcriptions",
        "create_transcription",
        _WHISPER,
        AnswerShape(("text",), media=_TEXT_MEDIA),
        _TRANSCRIPT,
        is_form=True,
    ),
    InferenceEndpoint(
        "audio/translations",
        "create_translation",
        _WHISPER,
        AnswerShape(("text",), media=_TEXT_MEDIA),
        _TRANSCRIPT,
        is_form=True,
    ),
)
ENDPOINTS = {row.name: row for row in _ROWS}
PATHS = {row.path: row for row in _ROWS}

_KEPT = AnswerShape(("output",), "type", may_be_empty=True)
STORED = tuple(
    InferenceEndpoint(
        f"responses/{{response_id}}{rest}",
        operation_id,
        {},
        shape,
        stream,
        Billed.NOTHING,
        method=method,
        stores=True,
        is_stored=True,
    )
    for method, rest, operation_id, shape, stream in (
        ("GET", "", "get_response", _KEPT, _RESPONSE),
        ("DELETE", "", "delete_response", AnswerShape(("deleted",)), None),
        ("POST", "/cancel", "cancel_response", _KEPT, None),
    )
)
"""What can be done with a stored response. Its text was billed when it was generated, or is when its end is seen."""
_STORED_PATH = re.compile(r"/v1/responses/([^/]{1,400})(/cancel)?")


def find_stored(path: str) -> tuple[str, list[InferenceEndpoint]] | None:
    """Return the id of the response that a path names, and the endpoints of the path; None if it names none."""
    found = _STORED_PATH.fullmatch(path)
    if found is None:
        return None
    return found[1], [row for row in STORED if row.name.endswith("/cancel") == bool(found[2])]


def endpoint_of(path: str, method: str) -> tuple[str, InferenceEndpoint]:
    """Return the id of the stored response that a lane's path names, if it names one, and the request's endpoint.

    If the path does not take the request's method, it is an endpoint of the path.
    """
    found = find_stored(path)
    if found is None:
        return "", PATHS[path]
    stored_id, rows = found
    return stored_id, next((row for row in rows if row.method == method), rows[0])
