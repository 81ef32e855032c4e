"""What a node's refusal says: its message, whether it is busy, lacks the model, or blames the request. Pure.

A node's words are shown to the client of the request alone, within bounds, and decide nothing for other clients.
"""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from pydantic_core import from_json

from lucid_compute.egress.faults import BadStatus, NodeBusy

READ_BYTES = 16_384  # of a refusal, which is a sentence
MAX_CHARACTERS = 500  # of a message that is passed on
FULL_SECONDS = 1.0  # of a node that is busy and does not say for how long
MAX_RETRY_AFTER_SECONDS = 3600.0
_OVERLOADED = 529  # no status of HTTP's, but in use
# Ollama: "server busy … maximum pending requests exceeded". llama.cpp: "Loading model". vLLM, SGLang: overloaded,
# starting, draining. `Retry-After` says it too.
_BUSY = re.compile(
    r"\bbus(?:y|ier)\b|over-?load|at capacity|capacity (?:is )?exceeded|insufficient capacity|too many"
    r"|queue(?:\w| )*full|pending requests|no (?:\w+ )?slots?\b|slots? (?:\w+ )*(?:busy|full|available)"
    r"|concurren(?:t|cy)|rate.?limit|throttl"
    r"|\bloading\b|still load|start(?:ing|s) up|is starting|warm(?:ing)?.?up|not (?:yet )?ready|\bdraining\b"
    r"|shutting down",
    re.IGNORECASE,
)
# OpenAI's code, and how vLLM, SGLang, Ollama and llama-swap say that they have not loaded a model.
_NO_MODEL_CODE = "model_not_found"
_MISSING = re.compile(r"not found|does not exist|not available|not (?:currently )?loaded|unknown model", re.IGNORECASE)
# llama.cpp answers 500 for tools without --jinja, pictures without a projector and bad grammars; Ollama for tools.
_REQUESTS_OWN = re.compile(
    r"not support|unsupported|requires? (?:the )?-|requires? .{0,40}\bflag\b|--jinja|\bmmproj\b"
    r"|(?:parse|invalid|initialize|compile|unknown) .{0,20}"
    r"(?:grammar|json.?schema|samplers?|image|audio|tool|chat template)"
    r"|exceeds? .{0,40}context|context .{0,40}exceed|(?:prompt|input) (?:is )?too (?:long|large)",
    re.IGNORECASE,
)
# 400 of vLLM, SGLang, llama.cpp and Ollama, 422 of TGI; OpenAI's code, and Anthropic's words.
_TOO_LONG = re.compile(
    r"context.?(?:length|size|window)|(?:model|sequence) length|(?:prompt|input).{0,40} too (?:long|large)"
    r"|must be <= \d|must have less than \d+ tokens|tokens? .{0,40}(?:exceed|limit|longer)|exceed.{0,40} tokens?\b",
    re.IGNORECASE,
)
_TOO_LONG_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\ud7ff\ue000-\uffff\U00010000-\U0010ffff]+")


def message_in(body: bytes) -> str:
    """Return the message of a refusal in JSON, in any of the usual shapes; empty if there is none."""
    value = _read(body)
    for _ in range(3):  # {"error": {"message": …}}, {"error": …}, {"detail": …}, {"detail": {"message": …}}
        if not isinstance(value, dict):
            break
        value = next((value[key] for key in ("error", "message", "detail", "msg") if value.get(key)), None)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("msg")
    if not isinstance(value, str):
        return ""
    text = _UNPRINTABLE.sub(" ", value[: 2 * MAX_CHARACTERS]).strip()
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


def refusal_of(status: int, retry_after: bytes, body: bytes, now: datetime) -> BadStatus:
    """Return what a status outside 2xx means: the node is busy, or it failed, perhaps because of the request."""
    said = message_in(body)
    seconds = parse_retry_after(retry_after, now)
    if status in {HTTPStatus.TOO_MANY_REQUESTS, _OVERLOADED} or (
        status == HTTPStatus.SERVICE_UNAVAILABLE and (seconds is not None or _BUSY.search(said or _plain(body)))
    ):
        return NodeBusy(status, FULL_SECONDS if seconds is None else seconds, said)
    is_requests_own = status >= HTTPStatus.INTERNAL_SERVER_ERROR and _REQUESTS_OWN.search(said) is not None
    return BadStatus(status, said, is_requests_own=is_requests_own)


def says_no_model(body: bytes, model_id: str) -> bool:
    """Return whether a refusal says that the node lacks the model: by a code, or a sentence with the id it was sent.

    A sentence may quote the client, so it must name the id that this service sent.
    """
    value = _read(body)
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict) and (
        _NO_MODEL_CODE in (error.get("code"), error.get("type")) or error.get("param") == "model"
    ):
        return True
    said = message_in(body)
    return model_id in said and _MISSING.search(said.replace(model_id, "")) is not None


def says_too_long(body: bytes) -> bool:
    """Return whether a refusal says that the request is too long for the node's context, by a code or a message."""
    value = _read(body)
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict) and not _TOO_LONG_CODES.isdisjoint({str(error.get("code")), str(error.get("type"))}):
        return True
    return _TOO_LONG.search(message_in(body)) is not None


def parse_retry_after(value: bytes, now: datetime) -> float | None:
    """Return the seconds of a `Retry-After`, a number or a date, from 0 to an hour; None if it is neither."""
    text = value.strip().decode("latin-1")[:40]
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text):
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    try:
        at = parsedate_to_datetime(text)
        return min(max((at - now).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)
    except (TypeError, ValueError):
        return None


# A thing that one node has stored, so that others answer 404: by key, or by the type of an item.
_STORED = re.compile(
    rb'"(?:previous_response_id|conversation|file_id|file_ids|vector_store_ids|container)"\s*+:\s*+(?!null|\[\s*+\])'
    rb'|"prompt"\s*+:\s*+\{|"type"\s*+:\s*+"item_reference"',
    re.IGNORECASE,  # Go reads keys in any case
)
_LETTER = re.compile(rb"\\u00([4-7][0-9a-fA-F])")
_MAX_SEARCHED = 1024 * 1024


def names_stored(body: bytes) -> bool:
    """Return whether a request may name a thing that one node has stored, such as `previous_response_id`.

    Letters written as escapes count, as every JSON parser reads them. A body over a megabyte may name one.
    """
    if len(body) > _MAX_SEARCHED:
        return True
    if b"\\u00" in body:
        body = _LETTER.sub(lambda escape: bytes([int(escape[1], 16)]), body)
    return _STORED.search(body) is not None


def _read(body: bytes) -> Any:
    if len(body) > READ_BYTES:
        return None
    try:
        return from_json(body)
    except ValueError:
        return None


def _plain(body: bytes) -> str:
    """Return a short text that is no JSON and no web page; else an empty one."""
    return "" if body.lstrip()[:1] in {b"<", b"{", b"["} else body[:MAX_CHARACTERS].decode("latin-1")
