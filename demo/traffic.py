"""Steady requests through the gateway, by a few consumers, until the demo has seen enough."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from http.client import SERVICE_UNAVAILABLE
from typing import NamedTuple

import openai

from demo.requests import Ask, chat, client_of, embed, greet, misname, mumble, overreach, stream
from demo.tally import Tally
from lucid_compute.registry.keys.shapes import NewKey


class Habit(NamedTuple):
    """Who asks for what, and how often; the pauses between are random around `pause_seconds`."""

    consumer: str
    ask: Ask
    pause_seconds: float


HABITS = (
    Habit("acme-shop", chat, 0.15),
    Habit("acme-shop", stream, 0.25),
    Habit("bright-search", embed, 0.2),
    Habit("bright-search", stream, 0.4),
    Habit("curious-student", chat, 0.5),
    Habit("curious-student", misname, 2.0),
    Habit("curious-student", overreach, 3.0),
    Habit("curious-student", mumble, 4.0),
    Habit("thrifty-startup", chat, 0.5),  # twice what its key allows
)


class Traffic:
    """Requests that are under way; `tally` is what became of those that ended."""

    def __init__(self, url: str, consumers: Mapping[str, NewKey]) -> None:
        self.tally = Tally()
        self._url, self._consumers = url, consumers
        self._is_over = asyncio.Event()

    async def flow(self) -> None:
        """Let everybody ask until `stop`; requests that are under way then are waited for."""
        async with AsyncExitStack() as stack:
            clients = {
                name: await stack.enter_async_context(client_of(self._url, key.key))
                for name, key in self._consumers.items()
            }
            async with asyncio.TaskGroup() as group:
                for habit in HABITS:
                    group.create_task(self._keep_asking(habit, clients[habit.consumer]))

    async def greet(self, node_id: str) -> bool:
        """Ask one node, by name, once; return whether it answered, and not whether its breaker is open."""
        async with client_of(self._url, self._consumers[HABITS[0].consumer].key) as client:
            try:
                await greet(client, self.tally, node_id)
            except openai.OpenAIError as error:
                if not isinstance(error, openai.APIStatusError) or error.status_code != SERVICE_UNAVAILABLE:
                    self._count(error)
                return False
        return True

    def stop(self) -> None:
        """Ask nothing more."""
        self._is_over.set()

    async def _keep_asking(self, habit: Habit, client: openai.AsyncOpenAI) -> None:
        while not self._is_over.is_set():
            await self._ask(habit, client)
            pause = habit.pause_seconds * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            try:
                await asyncio.wait_for(self._is_over.wait(), pause)
            except TimeoutError:
                continue

    async def _ask(self, habit: Habit, client: openai.AsyncOpenAI) -> None:
        has_limit = self._consumers[habit.consumer].limits is not None
        try:
            await habit.ask(client, self.tally)
        except openai.RateLimitError as error:
            if has_limit:
                self.tally.refused["429 RATE_LIMITED"] += 1
            else:
                self._count(error)
        except (openai.OpenAIError, ValueError) as error:
            self._count(error)

    def _count(self, error: Exception) -> None:
        if isinstance(error, openai.APIStatusError):
            self.tally.failed_attempts += int(error.response.headers.get("X-Lucid-Attempts", 0))
        self.tally.errors[f"{type(error).__name__}: {error}"] += 1
