"""The limits of keys over several replicas: spent at once, on any of them, and never more than the limit together."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from uuid import uuid4

import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.postgres.database import connect
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.key_limits import KeyLimits
from lucid_compute.registry.fleet.replicas import ReplicaRecord, Replicas, Snapshot
from lucid_compute.registry.keys.key_rates import CONFIRM_SECONDS, IDLE_SECONDS, TICK_SECONDS, KeyRates
from lucid_compute.registry.keys.limit_shares import Ask, Grant, LimitShares
from lucid_compute.registry.keys.sliding_window import WINDOW_SECONDS
from tests.factories import NOW
from tests.other_replicas import until


class Clock:
    """A monotonic clock that only the test moves; all replicas of a test have the same."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def limited(requests: int | None = None, tokens: int | None = None, key_id: str = "key") -> Principal:
    """A key with these limits."""
    return Principal(key_id, "acme", frozenset(), None, KeyLimits(requestsPerMinute=requests, tokensPerMinute=tokens))


@asynccontextmanager
async def replicas_on(
    url: str, count: int, clock: Callable[[], float], shares: type[LimitShares] = LimitShares
) -> AsyncIterator[list[KeyRates]]:
    """Live replicas that know of each other; their tasks exchange shares when they are asked to."""
    ids = [str(uuid4()) for _ in range(count)]
    leases = [ReplicaRecord(id_, NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for id_ in ids]
    rates = []
    for id_ in ids:
        replicas = Replicas()
        replicas.apply(id_, leases, NOW)
        rates.append(KeyRates(replicas, shares(url, replica_id=id_), clock))
    tasks = [asyncio.create_task(each.run()) for each in rates]
    try:
        yield rates
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def spend(rates: KeyRates, key: Principal) -> bool:
    """Return whether one more request is allowed, as a lane would find out."""
    try:
        while not rates.spend(key):
            await rates.ask(key)
    except RateLimited:
        return False
    return True


async def hammer(rates: KeyRates, key: Principal, times: int) -> int:
    """Return how many of so many requests are allowed, ten at a time."""

    async def one_after_another() -> int:
        return sum([await spend(rates, key) for _ in range(times // 10)])

    return sum(await asyncio.gather(*(one_after_another() for _ in range(10))))


async def settle(clock: Clock, rates: list[KeyRates]) -> None:
    """Let the time pass after which replicas return what they do not use, and let them return it."""
    clock.seconds += max(IDLE_SECONDS, TICK_SECONDS) + 0.1
    for each in rates:
        await each.exchange()


@pytest.mark.parametrize("limit", [1, 7, 30, 300, 3000])
@pytest.mark.parametrize("count", [2, 4])
async def test_a_client_of_one_replica_may_spend_the_limit_at_once(database_url: str, limit: int, count: int) -> None:
    """And again a minute later, on another replica."""
    clock, key = Clock(), limited(limit)
    async with replicas_on(database_url, count, clock) as rates:
        assert await hammer(rates[0], key, limit + 100) == limit
        assert await hammer(rates[1], key, 20) == 0
        clock.seconds += WINDOW_SECONDS + 1
        await settle(clock, rates)
        assert await hammer(rates[1], key, limit + 100) == limit


@pytest.mark.parametrize("limit", [1, 7, 30, 300, 3000])
async def test_clients_of_all_replicas_get_no_more_than_the_limit_together(database_url: str, limit: int) -> None:
    async with replicas_on(database_url, 3, Clock()) as rates:
        accepted = sum(await asyncio.gather(*(hammer(each, limited(limit), limit + 100) for each in rates)))
    assert 0.9 * limit <= accepted <= limit


async def test_a_client_that_changes_replicas_gets_what_is_left(database_url: str) -> None:
    """What the first one has not used is returned after a moment."""
    clock, key = Clock(), limited(300)
    async with replicas_on(database_url, 2, clock) as rates:
        assert await hammer(rates[0], key, 100) == 100
        await settle(clock, rates)
        assert await hammer(rates[1], key, 400) >= 0.98 * 200


async def test_a_steady_client_of_one_replica_gets_its_limit(database_url: str) -> None:
    """Five a second for four minutes, at a limit of 300, beside one that asks the other replica now and then."""
    clock, key = Clock(), limited(300)
    accepted = 0
    async with replicas_on(database_url, 2, clock) as rates:
        for number in range(1200):
            clock.seconds += 0.2
            accepted += await spend(rates[0], key)
            if number % 50 == 0:
                await spend(rates[1], limited(300, key_id="another"))
                await rates[0].exchange()
                await rates[1].exchange()
    assert accepted >= 0.98 * 1200


async def test_few_queries_are_sent_however_many_requests_there_are(database_url: str) -> None:
    """The fast path asks Postgres once for a twentieth of a limit, and not at all while the limit is spent."""
    clock, key = Clock(), limited(3000)
    async with replicas_on(database_url, 2, clock) as rates:
        shares = rates[0]._shares
        assert shares is not None
        asked = 0
        exchange = shares.exchange

        async def count(asks):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - passes on
            nonlocal asked
            asked += 1
            return await exchange(asks)

        shares.exchange = count  # type: ignore[method-assign]
        assert await hammer(rates[0], key, 10_000) == 3000
        assert asked <= 30


async def test_a_refusal_says_what_is_spent_everywhere_and_when_to_come_back(database_url: str) -> None:
    """A replica that has spent nothing itself knows when another one gets something back."""
    clock, key = Clock(), limited(30)
    async with replicas_on(database_url, 2, clock) as rates:
        assert await hammer(rates[0], key, 30) == 30
        clock.seconds += 5
        await rates[0].exchange()
        await rates[1].ask(key)
        with pytest.raises(RateLimited, match=r"limit of 30 requests a minute is reached: 30 are spent. Retry in") as e:
            rates[1].spend(key)
        assert 50 <= (e.value.retry_after_seconds or 0) <= 66  # it is returned two seconds later
        assert [left.remaining for left in rates[1].allowances(key)] == [0]


async def test_tokens_are_shared_too(database_url: str) -> None:
    """A debt on one replica refuses the key on the other."""
    clock, key = Clock(), limited(tokens=1000)
    async with replicas_on(database_url, 2, clock) as rates:
        assert await spend(rates[0], key)
        rates[0].charge_tokens(key, 2500)
        await rates[0].exchange()
        assert not await spend(rates[1], key)
        with pytest.raises(RateLimited, match="2,500 are spent"):
            rates[1].spend(key)


async def age_shares(url: str, seconds: float) -> None:
    """Let the shares have been confirmed so long ago."""
    connection = await connect(url)
    for key_id, text in await connection.fetch("SELECT key_id, shares FROM key_shares"):
        shares = {id_: {**share, "at": share["at"] - seconds} for id_, share in json.loads(text).items()}
        await connection.execute(
            "UPDATE key_shares SET shares = $1::jsonb WHERE key_id = $2", json.dumps(shares), key_id
        )
    await connection.close()


async def test_what_a_replica_spent_counts_for_a_minute_after_it_died(database_url: str) -> None:
    """And for no longer."""
    clock, key = Clock(), limited(300)
    async with replicas_on(database_url, 2, clock) as rates:
        assert await hammer(rates[0], key, 300) == 300
        rates[0]._clock = lambda: 0.0  # it does nothing more
        await age_shares(database_url, 50)
        assert await hammer(rates[1], key, 100) == 0
        await age_shares(database_url, 11)
        clock.seconds += 1
        assert await hammer(rates[1], key, 400) == 300


async def test_a_replica_confirms_what_it_holds(database_url: str) -> None:
    """Else it would count as dead while its key goes on spending, and others would allow as much again."""
    clock, key = Clock(), limited(300)
    async with replicas_on(database_url, 2, clock) as rates:
        assert await hammer(rates[0], key, 300) == 300
        await age_shares(database_url, 59)
        clock.seconds += CONFIRM_SECONDS
        await rates[0].exchange()
        await age_shares(database_url, 50)
        assert await hammer(rates[1], key, 100) == 0


async def test_while_postgres_is_away_each_replica_allows_an_equal_part(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A request waits for no more than the time of one query, and the shares hold again afterwards."""
    clock, key = Clock(), limited(300)
    async with replicas_on(database_url, 2, clock) as rates:
        lock = await connect(database_url)
        async with lock.transaction():
            await lock.execute("LOCK TABLE key_shares IN ACCESS EXCLUSIVE MODE")
            assert await hammer(rates[0], key, 400) == 150
            assert await hammer(rates[1], key, 400) == 150
        await lock.close()
        for _ in range(2):
            await settle(clock, rates)
        assert not await spend(rates[0], key)
        assert not await spend(rates[1], key)
        assert not rates[0]._is_cut_off
        clock.seconds += WINDOW_SECONDS + 1
        await settle(clock, rates)
        assert await hammer(rates[0], key, 400) == 300
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_keys_that_come_and_go_leave_nothing_in_memory(database_url: str) -> None:
    """More than one statement has room for."""
    clock = Clock()
    async with replicas_on(database_url, 2, clock) as rates:
        keys = [limited(60, key_id=f"key-{number}") for number in range(1200)]
        assert all(await asyncio.gather(*(spend(rates[0], key) for key in keys)))
        assert len(rates[0]._meters) == 1200
        clock.seconds += WINDOW_SECONDS + 1
        for _ in range(3):
            await settle(clock, rates)
        assert not rates[0]._meters
        connection = await connect(database_url)

        async def is_returned() -> bool:
            held = await connection.fetchval("SELECT count(*) FROM key_shares WHERE shares <> '{}'")
            return int(held) == 0

        await until(is_returned)
        await connection.close()


async def test_a_replica_that_stops_lets_waiting_requests_go_on(database_url: str) -> None:
    clock, key = Clock(), limited(30)
    async with replicas_on(database_url, 2, clock) as rates:
        waiting = asyncio.create_task(rates[0].ask(key))
        await asyncio.sleep(0)
    await waiting


def at_once(limit: int) -> Principal:
    """A key that may have so many requests at once."""
    return Principal("key", "acme", frozenset(), None, KeyLimits(concurrency=limit))


async def begin(rates: KeyRates, key: Principal) -> bool:
    """Return whether one more request may run, as a lane would find out."""
    try:
        if not rates.begin(key):
            await rates.wait(key)
    except RateLimited:
        return False
    return True


@asynccontextmanager
async def replicas_in_real_time(
    url: str, count: int, shares: type[LimitShares] = LimitShares
) -> AsyncIterator[list[KeyRates]]:
    """Replicas whose clock is the real one: places at once are returned within tenths of a second."""
    async with replicas_on(url, count, time.monotonic, shares) as rates:
        yield rates


class LateShares(LimitShares):
    """Shares whose exchanges take long, and of which some do not come in time, done or not."""

    def __init__(self, url: str, *, replica_id: str) -> None:
        super().__init__(url, replica_id=replica_id)
        self._random = Random(replica_id)

    async def exchange(self, asks: Sequence[Ask]) -> list[Grant]:
        """Exchange them late."""
        await self._be_late()
        grants = await super().exchange(asks)
        await self._be_late()
        return grants

    async def _be_late(self) -> None:
        await asyncio.sleep(self._random.random() * 0.05)
        if self._random.random() < 0.1:
            raise TimeoutError


@pytest.mark.parametrize("shares", [LimitShares, LateShares])
@pytest.mark.parametrize("limit", [1, 5, 12, 40])
async def test_requests_at_once_never_exceed_the_limit_over_all_replicas(
    database_url: str, limit: int, shares: type[LimitShares]
) -> None:
    """And each ends somewhere: at every instant no more run than the limit, and all of it is used."""
    key, running, most = at_once(limit), 0, 0
    async with replicas_in_real_time(database_url, 3, shares) as rates:

        async def run_some(each: KeyRates) -> int:
            nonlocal running, most
            done = 0
            for _ in range(20):
                if await begin(each, key):
                    running += 1
                    most = max(most, running)
                    await asyncio.sleep(0.005)
                    running -= 1
                    each.end(key)
                    done += 1
            return done

        tasks = [run_some(each) for each in rates for _ in range(2 * limit)]
        done = sum(await asyncio.gather(*tasks))
        assert most <= limit
        assert most >= max(1, limit // 2)
        assert done >= limit


async def test_a_client_that_changes_replicas_gets_the_places_that_it_left(database_url: str) -> None:
    """Its requests have ended at the first one: those at the next wait for a moment, and are not refused."""
    key = at_once(4)
    async with replicas_in_real_time(database_url, 2) as rates:
        for number in range(6):
            each = rates[number % 2]
            assert await asyncio.gather(*(begin(each, key) for _ in range(4))) == [True] * 4
            assert not await begin(rates[1 - number % 2], key)
            for _ in range(4):
                each.end(key)


async def test_places_of_a_replica_that_died_are_free_after_a_minute(database_url: str) -> None:
    key = at_once(2)
    async with replicas_in_real_time(database_url, 2) as rates:
        assert await begin(rates[0], key)
        assert await begin(rates[0], key)
    async with replicas_in_real_time(database_url, 2) as rates:
        assert not await begin(rates[0], key)
        connection = await connect(database_url)
        await connection.execute("""
            UPDATE key_shares SET shares = (
                SELECT jsonb_object_agg(key, value || jsonb_build_object('at', (value->>'at')::float8 - 61))
                FROM jsonb_each(shares)
            )
        """)
        await connection.close()
        assert await begin(rates[0], key)
