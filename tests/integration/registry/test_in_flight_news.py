"""The in-flight broadcast: counts of nodes with a limit reach other replicas at once; a lone replica sends none."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.postgres.database import connect
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.in_flight_broadcast import (
    IN_FLIGHT_CHANNEL,
    INTERVAL_SECONDS,
    NODES_A_MESSAGE,
    InFlightBroadcast,
)
from lucid_compute.registry.fleet.replicas import LEASE, ReplicaRecord, Snapshot
from tests.api import Api, open_api
from tests.factories import NOW, compute_passport
from tests.other_replicas import run_sql, until

SOON_SECONDS = 0.3  # 25 ms, and a noisy machine
OWN_ID = str(uuid4())
Connect = Callable[..., Awaitable[Any]]


class Received:
    """What is published on the channel, as another replica receives it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.counts: dict[str, int] = {}

    def receive(self, message: str) -> None:
        """Keep a message and its counts."""
        self.messages.append(message)
        body = json.loads(message)
        assert sorted(body) == ["at", "counts", "replica"]
        assert body["replica"] == OWN_ID
        self.counts.update(body["counts"])


@asynccontextmanager
async def listening(database_url: str) -> AsyncIterator[Received]:
    """Listen on the channel for as long as the block runs."""
    received = Received()
    connection = await connect(database_url)
    await connection.add_listener(IN_FLIGHT_CHANNEL, lambda *call: received.receive(str(call[-1])))
    yield received
    await connection.close()


@asynccontextmanager
async def publishing(
    database_url: str, fleet: Fleet, replica_id: str = OWN_ID, *, connect: Connect = connect
) -> AsyncIterator[None]:
    """Publish the fleet's counts for as long as the block runs."""
    connection = DedicatedConnection(database_url, Purpose.IN_FLIGHT, connect=connect)
    broadcast = InFlightBroadcast(connection, fleet, replica_id=replica_id, reconnect_seconds=0.05)
    task = asyncio.create_task(broadcast.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def fleet_of(count: int, *, with_another: bool = True, **metadata: Any) -> tuple[Fleet, list[str]]:
    """A fleet of nodes alike, and their ids; another replica lives, or not."""
    fleet = Fleet()
    records = [compute_passport({"maxConcurrency": 8, **metadata}) for _ in range(count)]
    for record in records:
        fleet.apply_passport(record)
    if with_another:
        fleet.replicas.apply(OWN_ID, [ReplicaRecord("other", NOW, NOW, NOW, Snapshot.parse("1:1:"), {})], NOW - LEASE)
    return fleet, [record.id for record in records]


async def until_received(received: Received, counts: dict[str, int], deadline_seconds: float = 5.0) -> None:
    """Wait until exactly these counts were published last."""

    async def is_so() -> bool:
        return received.counts == counts

    await until(is_so, deadline_seconds)


async def connections(api: Api) -> list[Any]:
    """Return the connections of broadcasts."""
    return await run_sql(
        api,
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'lucid in-flight news' "
        "AND datname = current_database()",
    )


async def test_the_other_replica_counts_a_request_long_before_the_next_lease(api: Api, database_url: str) -> None:
    """It begins here and is counted there, it ends here and is not; by leases alone it would take a second."""
    async with open_api(database_url, api.replica.settings) as other:
        limited = await api.register("limited", {"maxConcurrency": 2})
        here, there = api.replica.fleet.replicas, other.replica.fleet.replicas
        replica_id = api.replica.feed.replica_id

        async def are_known() -> bool:
            is_known = other.replica.fleet.find_node(limited) is not None
            return is_known and (here.count(), there.count()) == (2, 2)

        await until(are_known)
        for replica in (api, other):
            replica.replica.feed.lease_renewal_seconds = 30.0
        await asyncio.sleep(1.2)  # the renewals that were due before
        async with publishing(database_url, api.replica.fleet, replica_id):
            for step, expected in ((here.begin, 1), (here.begin, 2), (here.end, 1), (here.end, 0)):
                step(limited)

                async def is_counted(expected: int = expected) -> bool:
                    return there.in_flight(limited) == expected

                began = time.monotonic()
                await until(is_counted)
                assert time.monotonic() - began < SOON_SECONDS * 3


async def test_only_nodes_with_a_limit_are_told_of(database_url: str) -> None:
    """Other nodes have no limit that the counts could reach."""
    fleet, (limited,) = fleet_of(1)
    free = compute_passport()
    fleet.apply_passport(free)
    async with listening(database_url) as received, publishing(database_url, fleet):
        fleet.replicas.begin(free.id)
        fleet.replicas.begin("unknown")
        fleet.replicas.begin(limited)
        await until_received(received, {limited: 1})
        fleet.replicas.end(limited)
        await until_received(received, {limited: 0})


async def test_a_replica_that_is_alone_tells_nothing_and_connects_to_nothing(api: Api, database_url: str) -> None:
    """A deployment of one pays nothing."""
    fleet, (node,) = fleet_of(1, with_another=False)
    async with listening(database_url) as received, publishing(database_url, fleet):
        fleet.replicas.begin(node)
        await asyncio.sleep(0.3)
        assert not received.messages
        assert await connections(api) == []


async def test_under_load_forty_messages_a_second_are_the_most_and_the_last_word_is_told(database_url: str) -> None:
    """However often counts change."""
    fleet, nodes = fleet_of(3)
    async with listening(database_url) as received, publishing(database_url, fleet):
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < 1:
            for node in nodes:
                fleet.replicas.begin(node)
            await asyncio.sleep(0.001)
        await until_received(received, dict(fleet.replicas.own_in_flight))
        assert 5 < len(received.messages) <= seconds / INTERVAL_SECONDS + 2


async def test_many_nodes_are_told_of_in_several_messages_that_fit(database_url: str) -> None:
    """Postgres takes less than 8000 bytes."""
    fleet, nodes = fleet_of(3 * NODES_A_MESSAGE)
    fleet.replicas.own_in_flight.update(dict.fromkeys(nodes, 999_999_998))
    async with listening(database_url) as received, publishing(database_url, fleet):
        for node in nodes:
            fleet.replicas.begin(node)
        await until_received(received, dict.fromkeys(nodes, 999_999_999))
        assert len(received.messages) == 3
        assert all(len(message.encode()) < 8000 for message in received.messages)


async def test_it_tells_again_after_its_connection_was_cut(api: Api, database_url: str) -> None:
    """What was lost is in the next lease."""
    fleet, (one, two) = fleet_of(2)
    async with listening(database_url) as received, publishing(database_url, fleet):
        fleet.replicas.begin(one)
        await until_received(received, {one: 1})
        for (pid,) in await connections(api):
            await run_sql(api, "SELECT pg_terminate_backend($1)", pid)

        async def is_told() -> bool:
            fleet.replicas.begin(two)
            return two in received.counts

        await until(is_told)


async def test_it_goes_on_when_it_could_not_connect(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it was; only what is no outage is logged."""
    fleet, (node,) = fleet_of(1)
    faults = [ConnectionRefusedError("away"), RuntimeError("odd")]

    async def connect_at_last(*arguments: Any, **options: Any) -> Any:
        if faults:
            raise faults.pop(0)
        return await connect(*arguments, **options)

    async with listening(database_url) as received, publishing(database_url, fleet, connect=connect_at_last):

        async def is_told() -> bool:
            fleet.replicas.begin(node)
            return node in received.counts

        await until(is_told)
    assert "odd" in caplog.text
    assert "away" not in caplog.text


async def test_a_message_that_cannot_be_read_harms_nothing(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """Sent by hand, or by a newer version: it is left out, and what follows is followed."""
    for message in ("", "[]", "{}", '{"replica": "x", "at": "noon", "counts": {}}', '{"counts": {"a": null}}'):
        await run_sql(api, "SELECT pg_notify($1, $2)", IN_FLIGHT_CHANNEL, message)

    async def are_logged() -> bool:
        return caplog.text.count("could not be read and are left out") == 5

    await until(are_logged)
    node = await api.register()
    assert (await api.beat(node)).status_code == 200
