"""The demo's consumers: what they request through OpenAI's client, how often, and what they count."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http.client import SERVICE_UNAVAILABLE
from typing import Any

import openai

from demo.llama_cpp import MODEL
from demo.tiny_gguf import SENTENCE
from lucid_compute.registry.keys.shapes import NewKey

TOO_LARGE = "llama-3-70b"  # a model that no node has the memory for
REFUSED_BY_NODE = "400 by the node"
TIMEOUT_SECONDS = 20.0
TOKENS = 200
PEOPLE = 24  # behind a consumer; requests of one person go to one node, whose cache knows the conversation
LIMITS_PER_MINUTE = {"acme-shop": None, "bright-search": None, "curious-student": None, "thrifty-startup": 10}


@dataclass(slots=True)
class Counts:
    """What the clients saw.

    `errors` are responses that a client can do nothing about, `cut` streams that broke after their first word, and
    `refused` expected refusals, by status and code. `failed_attempts` were replaced without a client's noticing.
    """

    answered: int = 0
    cut: int = 0
    failed_attempts: int = 0
    rescued: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    by_node: Counter[str] = field(default_factory=Counter)

    def add(self, headers: Mapping[str, str], tokens_in: int, tokens_out: int) -> None:
        """Count a complete response."""
        attempts = int(headers["X-Lucid-Attempts"])
        self.answered += 1
        self.by_node[headers["X-Lucid-Node"]] += 1
        self.failed_attempts += attempts - 1
        self.rescued += attempts > 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out

    def add_error(self, error: Exception) -> None:
        """Count an unexpected error."""
        if isinstance(error, openai.APIStatusError):
            self.failed_attempts += int(error.response.headers.get("X-Lucid-Attempts", 0))
        self.errors[f"{type(error).__name__}: {error}"] += 1

    def line(self) -> str:
        """Return the counts in one line."""
        cut = f", {self.cut} streams cut" if self.cut else ""
        return (
            f"{self.answered:,} answered, {self.errors.total()} errors{cut}, {self.rescued} saved by another node, "
            f"{self.refused.total()} rightly refused"
        )


class Consumer:
    """One consumer: a client of the gateway with a key, which retries nothing."""

    def __init__(self, url: str, key: NewKey, counts: Counts) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key=key.key,
            max_retries=0,
            timeout=TIMEOUT_SECONDS,
            http_client=openai.DefaultAsyncHttpx2Client(trust_env=False),
        )
        self.has_limit = key.limits is not None
        self.counts = counts

    async def chat(self, **more: Any) -> None:
        """Request a complete answer, by default as one of many people."""
        more = more or {"user": f"person-{random.randrange(PEOPLE)}"}  # noqa: S311 - no secret
        raw = await self.client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"What comes after this? {SENTENCE}"}],
            max_tokens=TOKENS,
            **more,
        )
        usage = raw.parse().usage
        if usage is None:
            raise ValueError("an answer without usage")
        self.counts.add(raw.headers, usage.prompt_tokens, usage.completion_tokens)

    async def stream(self) -> None:
        """Request a stream and read it to its end."""
        raw = await self.client.chat.completions.with_raw_response.create(
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
            self.counts.cut += 1
            self.counts.failed_attempts += int(raw.headers["X-Lucid-Attempts"])
            return
        if usage is None:
            raise ValueError("a stream without usage")
        self.counts.add(raw.headers, usage.prompt_tokens, usage.completion_tokens)

    async def embed(self) -> None:
        """Request an embedding."""
        raw = await self.client.embeddings.with_raw_response.create(model=MODEL, input=SENTENCE)
        self.counts.add(raw.headers, raw.parse().usage.prompt_tokens, 0)

    async def request_unknown_model(self) -> None:
        """Request a model that does not exist."""
        await self._expect("404 MODEL_NOT_FOUND", "tiny-recite")

    async def request_too_large_model(self) -> None:
        """Request a model that no node has the memory for."""
        await self._expect("503 MODEL_UNAVAILABLE", TOO_LARGE)

    async def request_nonsense(self) -> None:
        """Send a body that the inference server refuses, which must not count against its node."""
        await self._expect(REFUSED_BY_NODE, MODEL, messages="What?")

    async def _expect(self, refusal: str, model: str, **body: Any) -> None:
        """Count the expected `refusal`, which begins with its status; anything else is an error."""
        try:
            await self.client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello?"}], max_tokens=TOKENS, extra_body=body
            )
        except openai.APIStatusError as error:
            if not refusal.startswith(f"{error.status_code} "):
                raise
            self.counts.failed_attempts += max(int(error.response.headers.get("X-Lucid-Attempts", 0)) - 1, 0)
            self.counts.refused[refusal] += 1
        else:
            self.counts.errors[f"answered, and not refused with {refusal}"] += 1


# Who sends what, and the mean pause between two requests in seconds.
HABITS: tuple[tuple[str, Callable[[Consumer], Awaitable[None]], float], ...] = (
    ("acme-shop", Consumer.chat, 0.15),
    ("acme-shop", Consumer.stream, 0.25),
    ("bright-search", Consumer.embed, 0.2),
    ("bright-search", Consumer.stream, 0.4),
    ("curious-student", Consumer.chat, 0.5),
    ("curious-student", Consumer.request_unknown_model, 2.0),
    ("curious-student", Consumer.request_too_large_model, 3.0),
    ("curious-student", Consumer.request_nonsense, 4.0),
    ("thrifty-startup", Consumer.chat, 0.5),  # twelve times what its key allows
)


class Clients:
    """All consumers; `counts` is what they saw."""

    def __init__(self, url: str, keys: Mapping[str, NewKey]) -> None:
        self.counts = Counts()
        self._url, self._keys = url, keys
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Send requests until `stop`; then wait for the responses under way."""
        async with AsyncExitStack() as stack:
            consumers = {name: Consumer(self._url, key, self.counts) for name, key in self._keys.items()}
            for consumer in consumers.values():
                await stack.enter_async_context(consumer.client)
            async with asyncio.TaskGroup() as group:
                for name, request, pause_seconds in HABITS:
                    group.create_task(self._repeat(consumers[name], request, pause_seconds))

    async def reach(self, node_id: str) -> bool:
        """Send one request that names its node; return whether the node responded. Its breaker may be open (503)."""
        consumer = Consumer(self._url, self._keys[HABITS[0][0]], self.counts)
        async with consumer.client:
            try:
                await consumer.chat(extra_body={"lucid": {"nodeIds": [node_id]}})
            except openai.OpenAIError as error:
                if not isinstance(error, openai.APIStatusError) or error.status_code != SERVICE_UNAVAILABLE:
                    self.counts.add_error(error)
                return False
        return True

    def stop(self) -> None:
        """Send no more requests."""
        self._is_over.set()

    async def _repeat(
        self, consumer: Consumer, request: Callable[[Consumer], Awaitable[None]], pause_seconds: float
    ) -> None:
        while not self._is_over.is_set():
            try:
                await request(consumer)
            except (openai.OpenAIError, ValueError) as error:
                if isinstance(error, openai.RateLimitError) and consumer.has_limit:
                    self.counts.refused["429 RATE_LIMITED"] += 1
                else:
                    self.counts.add_error(error)
            try:
                await asyncio.wait_for(self._is_over.wait(), pause_seconds * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            except TimeoutError:
                continue
