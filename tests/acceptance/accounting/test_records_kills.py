"""Two services, three replicas, one Postgres: processes are killed, and rollups stay the exact sums of the ledger."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import httpx

from lucid_compute.accounting.rollups import Retention, RollupKeeper
from lucid_compute.postgres.database import connect
from tests.fault_answers import respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import Gateway, chat_answer, open_gateway
from tests.ledger import expect_sums, read
from tests.lucid_serve import Served, eventually, folder, wait_until
from tests.record_checks import expect_tiers

SECONDS = 20.0
KEEP_ALL = Retention(24 * 30, 90, 1000)
BROKEN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
ENDED = "SELECT count(*) FROM jobs WHERE outcome <> 'running'"
KILL_KEEPERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lucid record keeper'"


async def test_records_are_the_ledgers_after_kills_of_everything() -> None:
    """Workers, a whole service, Postgres and who moves the records are killed while requests and heartbeats run."""
    chance = random.Random(7)
    async with AsyncExitStack() as stack:
        one = stack.enter_context(Served(stack.enter_context(folder()), WORKERS="2"))
        settings = {"BOOTSTRAP_ADMIN_KEY": one.admin_key}
        other = Served(stack.enter_context(folder()), one.database_url, **settings)
        other.start()
        stack.callback(other.kill)
        other.wait_until_ready()
        gateway = await stack.enter_async_context(open_gateway(one))
        node = await stack.enter_async_context(FaultNode())
        model = await gateway.add_model()
        nodes = [await gateway.add_node(node.url, model, pricePer1kTokens="0.0123") for _ in range(2)]
        until = time.monotonic() + SECONDS
        await asyncio.gather(
            *(_ask((one, other), gateway.key, model, node, chance=chance, until=until) for _ in range(6)),
            _beat((one, other), one.admin_key, nodes, model, until),
            _keep(one, chance, until),
            _kill(one, other, chance, until),
        )
        await _reconcile(one, gateway, nodes)
        other.stop()


async def _ask(
    services: tuple[Served, Served], key: str, model: str, node: FaultNode, *, chance: random.Random, until: float
) -> None:
    """Send requests to either service; the node answers them well, badly or not at all."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=10, trust_env=False) as client:
        while time.monotonic() < until:
            answer = chat_answer(tokens_in=chance.randint(0, 999), tokens_out=chance.randint(0, 999))
            well = Behaviour(answer=answer, delay_seconds=chance.choice([0, 0, 0.01, 0.3, 1.5]))
            badly = [
                Behaviour(answer=respond(b"{}", status=chance.choice([400, 500]))),
                Behaviour(cut_head_after=5, ending=Ending.RESET),
            ]
            node.script.append(well if chance.random() < 0.9 else chance.choice(badly))
            body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
            with suppress(httpx.HTTPError):
                await client.post(f"{chance.choice(services).url}/v1/chat/completions", json=body)
            await asyncio.sleep(0.01)


async def _beat(services: tuple[Served, Served], key: str, nodes: list[str], model: str, until: float) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=5, trust_env=False) as client:
        while time.monotonic() < until:
            for number, node in enumerate(nodes):
                body = {"passportId": node, "status": "healthy", "load": 0.5, "availableModels": [model]}
                with suppress(httpx.HTTPError):
                    url = f"{services[number % 2].url}/compute/heartbeat"
                    await client.post(url, json={**body, "queueDepth": 1})
            await asyncio.sleep(2)


async def _keep(served: Served, chance: random.Random, until: float) -> None:
    """Move the records on as another replica would, as if it were minutes, hours or days later."""
    while time.monotonic() < until:
        later = timedelta(minutes=chance.choice([0, 1, 65, 1600]))
        with suppress(*BROKEN):
            await RollupKeeper(served.database_url, KEEP_ALL, rows_a_move=3).keep(now=datetime.now(UTC) + later)
        await asyncio.sleep(0.2)


async def _kill(one: Served, other: Served, chance: random.Random, until: float) -> None:
    """SIGKILL a worker, the other service, Postgres or a keeper's connection, one after the other, again and again."""

    async def end_worker() -> None:
        if workers := one.workers():
            os.kill(chance.choice(sorted(workers)), signal.SIGKILL)

    async def end_service() -> None:
        await asyncio.to_thread(other.kill)
        other.start()
        await asyncio.to_thread(other.wait_until_ready)

    async def end_postgres() -> None:
        postmaster = one.ready_postmaster()
        if postmaster is not None:
            os.kill(postmaster, signal.SIGKILL)
            is_back = lambda: one.ready_postmaster() not in {None, postmaster}  # noqa: E731 - read once
            await asyncio.to_thread(wait_until, is_back, 30.0)

    async def end_keepers() -> None:
        with suppress(*BROKEN):
            await read(one.database_url, KILL_KEEPERS)

    deeds: list[Callable[[], Awaitable[None]]] = [end_worker, end_keepers, end_postgres, end_keepers, end_service]
    while time.monotonic() < until:
        for deed in deeds:
            await asyncio.sleep(chance.uniform(0.3, 1))
            await deed()


async def _reconcile(served: Served, gateway: Gateway, nodes: list[str]) -> None:
    """Fail unless sums, records of every length and the answers of the API are exactly what the ledger's rows say."""
    await asyncio.to_thread(served.wait_until_ready)
    before: list[Any] = []

    async def is_quiet() -> bool:
        """All that waited is written: jobs of replicas that were killed may go on running for a minute."""
        await asyncio.sleep(1)
        with suppress(*BROKEN):
            before.append(
                (await read(served.database_url, "SELECT count(*) FILTER (WHERE outcome <> 'running') FROM jobs"))[0][0]
            )
        return len(before) > 2 and before[-1] == before[-2] == before[-3]

    await eventually(is_quiet, 60)
    assert before[-1] > 200
    await expect_sums(served.database_url)
    await expect_tiers(served.database_url)
    connection = await connect(served.database_url, timeout_seconds=60)
    for scope in (*nodes, None):
        where = "outcome NOT IN ('running', 'lost')" + (f" AND node_id = '{scope}'" if scope else "")
        (row,) = await connection.fetch(
            f"SELECT count(*) AS requests, count(*) FILTER (WHERE outcome = 'failed') AS failed, "
            f"sum(tokens_out) AS out, sum(price_usd) AS usd FROM jobs WHERE {where}"
        )
        for step in ("1m", "1h", "1d"):
            path = "/compute/metrics" + (f"/{scope}" if scope else "")
            span = {"from": "-2h" if step == "1m" else "-2d", "step": step}
            totals = (await gateway.admin.get(path, params=span)).json()["totals"]
            found = (totals["requests"], totals["failed"], totals["tokensOut"], Decimal(totals["revenueUsd"]))
            assert found == (row["requests"], row["failed"], row["out"], row["usd"]), (scope, step)
        jobs = (await gateway.admin.get("/compute/jobs", params={"since": "2020-01-01T00:00:00Z"})).json()
        assert jobs["pagination"]["total"] == await connection.fetchval("SELECT count(*) FROM jobs")
    await connection.close()
