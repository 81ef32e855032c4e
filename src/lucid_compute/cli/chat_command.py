"""`lucid chat`: a conversation with a model in the terminal, or one reply for a script."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Annotated, Any

import typer
from pydantic.alias_generators import to_camel

from lucid_compute.cli.connection import ApiOption, Connection, KeyOption
from lucid_compute.cli.failures import CommandFailed, ExitStatus, write
from lucid_compute.cli.formatting import plain, took
from lucid_compute.cli.lookup import node_names
from lucid_compute.cli.model_commands import ModelArgument
from lucid_compute.cli.output import JsonOption, note, show_json
from lucid_compute.client import Lucid
from lucid_compute.client.chat_stream import ChatSummary, stream_chat
from lucid_compute.client.errors import LucidClientError

JOB_WAIT_SECONDS = 2.0  # a job is written within 30 ms, unless the database is away
JOBS_LOOKED_AT = 50
CLOCK_TOLERANCE = timedelta(minutes=10)
Message = dict[str, str]


def chat(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to say, for one reply. Unset: stdin, or a conversation."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a reply, at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="As the model takes it.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Chat with a model. The reply goes to stdout; node, times, tokens and price go to stderr.

    In a conversation, an empty line or Ctrl-D ends it. Ctrl-C ends it at once.
    """
    talks = prompt is None and sys.stdin.isatty()
    if talks and as_json:
        raise CommandFailed("--json is for one reply: give a prompt, or send it to stdin.", ExitStatus.USAGE)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    options = {"max_tokens": max_tokens, "temperature": temperature}
    with Connection(api, key) as connection:
        for said in _conversation() if talks else [_one_prompt(prompt)]:
            messages.append({"role": "user", "content": said})
            with connection.session() as lucid:
                text = _reply(lucid, model, messages, options, as_json=as_json)
            messages.append({"role": "assistant", "content": text})


def _one_prompt(prompt: str | None) -> str:
    said = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    if not said.strip():
        raise CommandFailed("The prompt is empty. Give one, or send it to stdin.", ExitStatus.USAGE)
    return said


def _conversation() -> Iterator[str]:
    """Iterate over the lines that a person types."""
    note("An empty line or Ctrl-D ends the conversation.")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line.strip():
            if not line:
                sys.stderr.write("\n")
            return
        yield line.strip()


def _reply(lucid: Lucid, model: str, messages: Sequence[Message], options: dict[str, Any], *, as_json: bool) -> str:
    """Return the reply's text. It is written while it comes, or as JSON at the end."""
    pieces: list[str] = []
    is_terminal = sys.stdout.isatty()
    with stream_chat(lucid.transport, model, messages, **options) as stream:
        try:
            for piece in stream:
                pieces.append(piece)
                if not as_json:
                    write(_shown(piece) if is_terminal else piece)
        finally:
            if not as_json and pieces and not pieces[-1].endswith("\n"):
                write("\n")
    text, summary = "".join(pieces), stream.summary
    price = _find_price(lucid, model, summary.job_id)
    node = node_names(lucid, [summary.node_id]).get(summary.node_id or "", summary.node_id)
    if as_json:
        known = {
            to_camel(name): round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(summary).items()
        }
        show_json({"model": model, "text": text, "node": node, "priceUsd": price, **known})
    else:
        note(_summary(summary, node, price))
    return text


def _summary(summary: ChatSummary, node: str | None, price: str | None) -> str:
    parts = [node or "the model's upstream"]
    if (first := summary.first_token_seconds) is not None:
        parts.append(f"first token after {took(first * 1000)}")
    parts.append(f"{took(summary.seconds * 1000)} in all")
    if summary.tokens_out is not None:
        parts.append(f"{summary.tokens_in or 0:,} tokens in, {summary.tokens_out:,} out")
        if first is not None and summary.tokens_out > 1 and summary.seconds > first:
            parts.append(f"{(summary.tokens_out - 1) / (summary.seconds - first):,.0f} tokens/s")
    if price is not None:
        parts.append(f"${price}")
    if summary.finish_reason == "length":
        parts.append("cut off at the limit of tokens")
    return f"[{', '.join(parts)}; job {summary.job_id}]"


def _find_price(lucid: Lucid, model: str, job_id: str | None) -> str | None:
    """Return what the reply cost, of the job in the ledger; None if this key may not read it, or it has no price."""
    deadline = time.monotonic() + JOB_WAIT_SECONDS
    since = datetime.now(UTC) - CLOCK_TOLERANCE
    try:
        while job_id is not None:
            newest = islice(lucid.compute.jobs(model=model, since=since), JOBS_LOOKED_AT)
            ended = [job for job in newest if job.id == job_id and job.outcome != "running"]
            if ended or time.monotonic() > deadline:
                return ended[0].price_usd if ended else None
            time.sleep(0.1)
    except LucidClientError:  # the reply is there; what it cost is a detail
        return None
    return None


def _shown(piece: str) -> str:
    """Return the text with control characters written out, except those that end lines."""
    return "".join(mark if mark in "\n\t" else plain(mark) for mark in piece)
