"""Calls, sent: once in threads, once in asyncio. What they share stands in `exchange` and `attempts`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from random import random as any_share
from typing import TypeVar, cast
from uuid import uuid4

import httpx

from lucid_compute.client.attempts import Attempts
from lucid_compute.client.call import Call
from lucid_compute.client.deadline import DeadlineTransport
from lucid_compute.client.errors import LucidClientError
from lucid_compute.client.exchange import LIMITS, Exchange, tls_of
from lucid_compute.client.faults import read_fault
from lucid_compute.client.settings import ClientSettings

T = TypeVar("T")
_FAULTS = (httpx.HTTPError, httpx.InvalidURL, TimeoutError)


class Transport:
    """Sends calls one after the other, from any thread; connections are kept for the next one."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = any_share,
    ) -> None:
        """Connect to nothing yet. `clock`, `sleep` and `random` decide about the pauses between attempts."""
        self._clock, self._sleep, self._random = clock, sleep, random
        self.exchange = Exchange(settings)
        self._http = httpx.Client(transport=DeadlineTransport(tls_of(settings), LIMITS), trust_env=False)

    def run(self, call: Call[T]) -> T:
        """Send a call until it is answered, refused for good, or out of time.

        Raises:
            LucidClientError: that of the last attempt.
        """
        attempts = Attempts(call, self.exchange.policy, now_seconds=self._clock(), random=self._random)
        request_id = uuid4().hex
        while True:
            try:
                return self._attempt(call, request_id, attempts.seconds_for_attempt(self._clock()))
            except LucidClientError as error:
                if attempts.is_done_by(error):
                    return cast("T", None)
                if (pause := attempts.find_pause_seconds(error, self._clock())) is None:
                    raise
            self._sleep(pause)

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def _attempt(self, call: Call[T], request_id: str, seconds: float) -> T:
        request = self.exchange.request(call, request_id, seconds, time.monotonic() + seconds)
        try:
            response = self._http.send(request, stream=True, follow_redirects=False)
            try:
                content = bytearray()
                for piece in response.iter_raw():
                    content += piece
                    self.exchange.require_size(len(content))
            finally:
                response.close()
        except _FAULTS as error:
            fault = read_fault(error, self.exchange.base_url, seconds)
            fault.request_id = request_id
            raise fault from error
        return self.exchange.read(call, response.status_code, response.headers, bytes(content))


class AsyncTransport:
    """Sends calls from one event loop, as many at a time as are asked for; connections are kept for the next one."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = any_share,
    ) -> None:
        """Connect to nothing yet. `clock`, `sleep` and `random` decide about the pauses between attempts."""
        self._clock, self._sleep, self._random = clock, sleep, random
        self.exchange = Exchange(settings)
        transport = httpx.AsyncHTTPTransport(verify=tls_of(settings), trust_env=False, limits=LIMITS)
        self._http = httpx.AsyncClient(transport=transport, trust_env=False)

    async def run(self, call: Call[T]) -> T:
        """Send a call until it is answered, refused for good, or out of time.

        Raises:
            LucidClientError: that of the last attempt.
        """
        attempts = Attempts(call, self.exchange.policy, now_seconds=self._clock(), random=self._random)
        request_id = uuid4().hex
        while True:
            try:
                return await self._attempt(call, request_id, attempts.seconds_for_attempt(self._clock()))
            except LucidClientError as error:
                if attempts.is_done_by(error):
                    return cast("T", None)
                if (pause := attempts.find_pause_seconds(error, self._clock())) is None:
                    raise
            await self._sleep(pause)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def _attempt(self, call: Call[T], request_id: str, seconds: float) -> T:
        request = self.exchange.request(call, request_id, seconds, time.monotonic() + seconds)
        try:
            async with asyncio.timeout(seconds):
                response = await self._http.send(request, stream=True, follow_redirects=False)
                try:
                    content = bytearray()
                    async for piece in response.aiter_raw():
                        content += piece
                        self.exchange.require_size(len(content))
                finally:
                    await response.aclose()
        except _FAULTS as error:
            fault = read_fault(error, self.exchange.base_url, seconds)
            fault.request_id = request_id
            raise fault from error
        return self.exchange.read(call, response.status_code, response.headers, bytes(content))
