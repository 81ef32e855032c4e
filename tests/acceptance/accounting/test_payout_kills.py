"""Processes are killed while requests are billed: each job of the ledger is in the payouts exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from decimal import Decimal
from typing import Any

import httpx

from lucid_compute.registry.domain.prices import total
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway, chat_answer, open_gateway
from tests.ledger import expect_payouts
from tests.lucid_serve import Served, eventually, serving

CLIENTS = 4
RECOVERS_SECONDS = 30.0
LOST_TO_A_KILL = 40  # the requests of some tens of milliseconds that were answered and not written yet


class Asked:
    """Clients that ask one after the other; `answered` counts the answers that came whole."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        self._gateway = gateway
        self._model = model
        self.answered = 0

    async def ask(self) -> None:
        """Go on asking."""
        while True:
            with suppress(httpx.HTTPError):
                answer = await self._gateway.chat(self._model)
                self.answered += answer.status_code == httpx.codes.OK
            await asyncio.sleep(0.005)

    async def goes_on(self) -> None:
        """Wait until twenty further requests were answered."""
        before = self.answered

        async def does() -> bool:
            return self.answered >= before + 20

        await eventually(does, RECOVERS_SECONDS)


async def kill_each_in_turn(served: Served, asked: Asked) -> int:
    """Kill the service and its Postgres under load, twice each; return how many rows that may have cost."""
    for _ in range(2):
        await asked.goes_on()
        served.kill()
        await asyncio.to_thread(served.start)
        await asyncio.to_thread(served.wait_until_ready)
        await asked.goes_on()
        postmaster = served.ready_postmaster()
        assert postmaster is not None
        os.kill(postmaster, signal.SIGKILL)
        await asked.goes_on()
    return 2 * LOST_TO_A_KILL


async def test_what_is_killed_bills_nothing_twice_and_loses_no_more_than_what_was_not_written_yet() -> None:
    """A kill of Postgres costs nothing: what waited is written when it is back."""
    async with FaultNode(Behaviour(answer=chat_answer(tokens_in=2, tokens_out=1))) as node:
        with serving(PORT=str(_free_port())) as served:
            async with open_gateway(served) as gateway:
                model = await gateway.add_model()
                node_id = await gateway.add_node(node.url, model, pricePer1kTokens="1")
                asked = Asked(gateway, model)
                clients = [asyncio.create_task(asked.ask()) for _ in range(CLIENTS)]
                beats = asyncio.create_task(_beat(gateway, node_id, model))
                try:
                    may_lack = await kill_each_in_turn(served, asked)
                finally:
                    for task in (*clients, beats):
                        task.cancel()
                    await asyncio.gather(*clients, beats, return_exceptions=True)
                provider = await _paid(gateway, at_least=asked.answered - may_lack)
                assert provider["jobs"] <= len(node.requests)
                assert Decimal(provider["grossUsd"]) == total([Decimal("0.003")] * provider["jobs"])
                await expect_payouts(served.database_url)


async def _paid(gateway: Gateway, *, at_least: int) -> dict[str, Any]:
    """The provider's line once so many jobs are on it, which were waiting for Postgres, and no more come."""
    found: dict[str, Any] = {}

    async def is_there() -> bool:
        await asyncio.sleep(0.5)
        before = found.get("jobs")
        answer = await gateway.admin.get("/payouts")
        if answer.status_code == httpx.codes.OK:
            found.update(next((each for each in answer.json()["lines"] if each["role"] == "provider"), {}))
        return before is not None and before == found["jobs"] >= at_least

    await eventually(is_there, RECOVERS_SECONDS)
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _beat(gateway: Gateway, node_id: str, model: str) -> None:
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            await gateway.beat(node_id, model)
        await asyncio.sleep(2)
