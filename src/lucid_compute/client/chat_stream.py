"""Stream a chat completion: the pieces of text as they come, then which node answered, how fast, and the tokens.

For the command line. Programs use a client of OpenAI, which this service speaks to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lucid_compute.client.call import ApiCall
from lucid_compute.client.errors import ServiceFailed, UnexpectedAnswer
from lucid_compute.client.transport import Streamed, Transport

LONGEST_WAIT_SECONDS = 600.0  # between two pieces; the service gives up earlier
MAX_LINE_CHARACTERS = 4 * 1024 * 1024
_DATA = "data:"


@dataclass(slots=True)
class ChatSummary:
    """What is known of a chat completion when its stream has ended. None is unknown."""

    job_id: str | None = None
    node_id: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    finish_reason: str | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0


class ChatStream:
    """A running chat completion. Iterate over its text once, then read `summary`."""

    def __init__(self, streamed: Streamed, started: float) -> None:
        self._streamed, self._started = streamed, started
        self.summary = ChatSummary(streamed.headers.get("x-lucid-job"), streamed.headers.get("x-lucid-node"))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the pieces of text.

        Raises:
            LucidClientError: the stream broke, or the node reported an error in it.
        """
        has_ended = False
        for line in self._streamed.lines(MAX_LINE_CHARACTERS):
            if not line.startswith(_DATA):
                continue
            text = line.removeprefix(_DATA).strip()
            if has_ended := text == "[DONE]":
                break
            yield from self._read(_event(text))
        self.summary.seconds = time.monotonic() - self._started
        if not has_ended and self.summary.finish_reason is None:
            raise UnexpectedAnswer("The stream ended before the reply was complete.", code="STREAM_CUT_OFF")

    def _read(self, event: Mapping[str, Any]) -> Iterator[str]:
        if (error := event.get("error")) is not None:
            message = error.get("message") if isinstance(error, dict) else error
            raise ServiceFailed(f"The reply broke off: {message}", code="STREAM_FAILED")
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.summary.tokens_in = _count(usage.get("prompt_tokens"))
            self.summary.tokens_out = _count(usage.get("completion_tokens"))
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                yield from self._read_choice(choice)

    def _read_choice(self, choice: Mapping[str, Any]) -> Iterator[str]:
        if isinstance(reason := choice.get("finish_reason"), str):
            self.summary.finish_reason = reason
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(content, str) and content:
            if self.summary.first_token_seconds is None:
                self.summary.first_token_seconds = time.monotonic() - self._started
            yield content


@contextmanager
def stream_chat(
    transport: Transport, model: str, messages: Sequence[Mapping[str, str]], **options: Any
) -> Iterator[ChatStream]:
    """Request a chat completion, and yield its stream. A reply that still runs at the block's end is cancelled.

    `options` are fields of the body, such as `max_tokens`; None is left out.

    Raises:
        LucidClientError: the service refused, or can't be reached.
    """
    given = {name: value for name, value in options.items() if value is not None}
    body = {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps({**body, **given}).encode()
    call = ApiCall(method="POST", path="/v1/chat/completions", body=content, answer=str, is_repeatable=False)
    started = time.monotonic()
    with transport.stream(call, LONGEST_WAIT_SECONDS) as streamed:
        yield ChatStream(streamed, started)


def _event(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnexpectedAnswer("A piece of the stream is not JSON.", code="NOT_JSON")
    return found


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
