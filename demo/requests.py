"""What the demo's consumers ask for, by OpenAI's own client, which tries nothing twice here."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import openai

from demo.cast import TOO_LARGE
from demo.llama_cpp import MODEL
from demo.tally import Tally
from demo.tiny_gguf import SENTENCE

REFUSED_BY_NODE = "400 by the node"
SECONDS_TO_ANSWER = 20.0
TOKENS = 200
PEOPLE = 24  # behind a consumer; what one of them asks goes to one node, whose cache knows what was said before
Ask = Callable[[openai.AsyncOpenAI, Tally], Awaitable[None]]


def client_of(url: str, key: str) -> openai.AsyncOpenAI:
    """Return a client that speaks to the gateway."""
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        timeout=SECONDS_TO_ANSWER,
        http_client=openai.DefaultAsyncHttpx2Client(trust_env=False),
    )


async def chat(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Ask for a whole answer, as one of many people."""
    await _chat(client, tally, user=f"person-{random.randrange(PEOPLE)}")  # noqa: S311 - no secret


async def greet(client: openai.AsyncOpenAI, tally: Tally, node_id: str) -> None:
    """Ask one node, by name, for a whole answer."""
    await _chat(client, tally, extra_body={"lucid": {"nodeIds": [node_id]}})


async def _chat(client: openai.AsyncOpenAI, tally: Tally, **more: Any) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"What comes after this? {SENTENCE}"}],
        max_tokens=TOKENS,
        **more,
    )
    usage = raw.parse().usage
    if usage is None:
        raise ValueError("an answer without usage")
    tally.answer(*_served_by(raw.headers), usage.prompt_tokens, usage.completion_tokens)


async def stream(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Ask for a stream and read it to its end."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"How does this go on? {SENTENCE}"}],
        max_tokens=TOKENS // 4,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    try:
        async for chunk in raw.parse():
            usage = chunk.usage or usage
    except openai.APIError:
        tally.cut += 1
        tally.failed_attempts += int(raw.headers["X-Lucid-Attempts"])
        return
    if usage is None:
        raise ValueError("a stream without usage")
    tally.answer(*_served_by(raw.headers), usage.prompt_tokens, usage.completion_tokens)


async def embed(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Ask for an embedding."""
    raw = await client.embeddings.with_raw_response.create(model=MODEL, input=SENTENCE)
    tally.answer(*_served_by(raw.headers), raw.parse().usage.prompt_tokens, 0)


async def misname(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Ask for a model that nobody has registered."""
    await _refused(tally, "404 MODEL_NOT_FOUND", _chat_with(client, "tiny-recite"))


async def overreach(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Ask for a model that no node has the memory for."""
    await _refused(tally, "503 MODEL_UNAVAILABLE", _chat_with(client, TOO_LARGE))


async def mumble(client: openai.AsyncOpenAI, tally: Tally) -> None:
    """Send what the inference server itself refuses, which counts against nobody's node."""
    await _refused(tally, REFUSED_BY_NODE, _chat_with(client, MODEL, messages="What?"))


def _chat_with(client: openai.AsyncOpenAI, model: str, **body: Any) -> Awaitable[Any]:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello?"}], max_tokens=TOKENS, extra_body=body
    )


async def _refused(tally: Tally, how: str, request: Awaitable[Any]) -> None:
    """Count the refusal that has to come, `how` beginning with its status; anything else is an error."""
    try:
        await request
    except openai.APIStatusError as error:
        if not how.startswith(f"{error.status_code} "):
            raise
        tally.failed_attempts += max(int(error.response.headers.get("X-Lucid-Attempts", 0)) - 1, 0)
        tally.refused[how] += 1
    else:
        tally.errors[f"answered, and not refused with {how}"] += 1


def _served_by(headers: Mapping[str, str]) -> tuple[str, int]:
    """Return the node that served, and at which attempt."""
    return headers["X-Lucid-Node"], int(headers["X-Lucid-Attempts"])
