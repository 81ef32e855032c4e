"""`/metrics` of a real service with several workers: whichever answers, it answers for all, and nothing gets less."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx

from tests.lucid_serve import Served, eventually, serving
from tests.prometheus import value_of

REQUESTS = 'lucid_http_requests_total{method="GET",route="/healthz",status="2xx"}'


async def ask(served: Served, path: str) -> httpx.Response:
    """Send one request on a connection of its own, so that the kernel picks a worker."""
    async with served.client() as client:
        return await client.get(path)


async def counted(served: Served, series: str = REQUESTS) -> float:
    """What one scrape says of a series; 0 while it is not there."""
    return value_of((await ask(served, "/metrics")).text, series)


async def test_a_scrape_answers_for_every_worker(database_url: str) -> None:
    """Sixty requests are sixty in each of many scrapes, and gauges of three workers are added up or one of them."""
    with serving(database_url, WORKERS="3") as served:

        async def are_there() -> bool:
            return await counted(served, "lucid_workers") == 3

        await eventually(are_there)
        for _ in range(60):
            assert (await ask(served, "/healthz")).status_code == 200

        async def is_whole() -> bool:
            return await counted(served) == 60

        await eventually(is_whole)
        assert {await counted(served) for _ in range(20)} == {60}
        assert await counted(served, "lucid_replicas") == 3


async def test_a_worker_that_is_killed_takes_nothing_along_that_was_seen(database_url: str) -> None:
    """Counters never get less while workers are killed one after the other; those who follow count on from there."""
    with serving(database_url, WORKERS="2", METRICS_PUBLIC="true") as served:
        seen = [0.0]

        async def scrape_and_ask() -> None:
            try:
                await ask(served, "/healthz")
                seen.append(await counted(served))
            except httpx.TransportError:
                return  # it was killed with the request in hand

        for _ in range(5):
            before = served.workers()
            for _ in range(10):
                await scrape_and_ask()
            os.kill(next(iter(before)), signal.SIGKILL)
            while served.workers() == before or len(served.workers()) < 2:
                await scrape_and_ask()
                await asyncio.sleep(0)
        assert seen == sorted(seen)
        assert seen[-1] >= 50

        async def are_there() -> bool:
            return await counted(served, "lucid_workers") == 2

        await eventually(are_there)
        await asyncio.sleep(1.5)  # what was counted meanwhile is on the board
        last = await counted(served)
        for _ in range(20):
            await ask(served, "/healthz")

        async def is_whole() -> bool:
            return await counted(served) == last + 20

        await eventually(is_whole)
