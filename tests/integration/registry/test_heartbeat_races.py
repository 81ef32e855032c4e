"""Races of heartbeats: two replicas, two boots, lost acknowledgements, and a writer that stumbles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import connect
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.fleet.change_feed import OwnHeartbeats
from lucid_compute.registry.heartbeat_writer import COMMIT_HEARTBEATS, USE_INDEXES, HeartbeatWriter
from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.factories import NOW, heartbeat
from tests.other_replicas import run_sql, until


def report(node_id: str, boot: str, sequence: int) -> str:
    """One heartbeat as the writer sends it to Postgres."""
    beat = heartbeat(node_id, bootId=boot, sequence=sequence)
    return f"[{beat.model_dump_json(exclude_none=True)}]"


async def test_two_boots_that_race_leave_the_living_one_in(api: Api, database_url: str) -> None:
    """The old boot's late heartbeat loses to the new boot's, also when their transactions overlap."""
    node_id = await api.register()
    assert (await api.beat(node_id, bootId="old", sequence=4)).status_code == 200
    writer = api.replica.heartbeats._own.writer_id
    young, late = await connect(database_url), await connect(database_url)
    try:
        held = young.transaction()
        await held.start()
        await young.fetch(COMMIT_HEARTBEATS, report(node_id, "new", 1), NOW, writer)
        waiting = asyncio.create_task(late.fetch(COMMIT_HEARTBEATS, report(node_id, "old", 5), NOW, writer))
        await asyncio.sleep(0.2)
        await held.commit()
        rows = await waiting
        assert [(row["outcome"], row["revision"]) for row in rows] == [("applied", None)]
    finally:
        await young.close()
        await late.close()
    assert (await api.beat(node_id, bootId="new", sequence=2)).status_code == 200
    assert (await api.beat(node_id, bootId="old", sequence=6)).status_code == 422


@pytest.mark.parametrize(
    ("own", "status"),
    [({"load": 0.9}, 200), ({"bootId": "old", "sequence": 5, "load": 0.9}, 422)],
    ids=["without a boot it is written", "of the former boot it is refused"],
)
async def test_a_heartbeat_that_lost_a_race_for_its_row_is_judged_again(
    api: Api, database_url: str, own: dict[str, object], status: int
) -> None:
    """It was judged before another replica's commit, and wrote nothing: its answer says what became of it."""
    node_id = await api.register()
    assert (await api.beat(node_id, load=0.1, bootId="old", sequence=4)).status_code == 200
    other = await connect(database_url)
    try:
        async with other.transaction():
            await other.fetch(COMMIT_HEARTBEATS, report(node_id, "new", 1), NOW, str(uuid4()))
            racing = asyncio.create_task(api.beat(node_id, **own))
            await until(partial(waits_for_a_lock, api))
        assert (await racing).status_code == status
        written = await other.fetchval("SELECT report->>'load' FROM heartbeats WHERE passport_id = $1", node_id)
    finally:
        await other.close()
    is_taken = status == 200
    assert (float(written) == 0.9) is is_taken
    await api.replica.feed.catch_up()
    assert ((await api.health(node_id))["load"] == 0.9) is is_taken


async def waits_for_a_lock(api: Api) -> bool:
    """Whether the writer of heartbeats waits for another transaction."""
    rows = await run_sql(
        api,
        "SELECT FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'lucid heartbeats' AND wait_event_type = 'Lock'",
    )
    return bool(rows)


async def test_a_commit_reads_the_rows_of_its_nodes_and_no_others(api: Api, database_url: str) -> None:
    """By the plan that Postgres keeps for the statement, however many nodes there are."""
    nodes = [await api.register(f"node-{number}") for number in range(30)]
    reports = ",".join(heartbeat(node_id).model_dump_json(exclude_none=True) for node_id in nodes[:2])
    connection = await connect(database_url, session=USE_INDEXES)
    try:
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        await connection.execute(f"PREPARE commit_heartbeats (text, timestamptz, uuid) AS {COMMIT_HEARTBEATS}")
        call = f"EXECUTE commit_heartbeats ('[{reports}]', '{NOW.isoformat()}', '{uuid4()}')"
        (plan,) = json.loads(await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {call}"))
    finally:
        await connection.close()
    steps = [step for step in steps_of(plan["Plan"]) if step.get("Relation Name") == "heartbeats"]
    read = [step for step in steps if "Scan" in step["Node Type"]]
    assert len(read) == 2  # to judge, and to write
    assert [round(step["Actual Rows"] * step["Actual Loops"]) for step in read] == [2, 2]


def steps_of(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a step of a plan, and all steps below it."""
    yield step
    for below in step.get("Plans", ()):
        yield from steps_of(below)


async def test_two_replicas_that_take_the_same_nodes_do_not_deadlock(
    api: Api, database_url: str, settings: Settings
) -> None:
    """Groups lock their rows in one order, whatever order the heartbeats came in."""
    nodes = [await api.register(f"node-{number}") for number in range(30)]
    async with open_api(database_url, settings) as other:
        await other.replica.feed.catch_up()

        async def beat_all(sender: Api, order: list[str]) -> None:
            writer = sender.replica.heartbeats
            for _ in range(10):
                await asyncio.gather(*(writer.write(heartbeat(node_id)) for node_id in order))

        await asyncio.gather(beat_all(api, nodes), beat_all(other, nodes[::-1]))


async def test_a_heartbeat_whose_acknowledgement_was_lost_is_read_back(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was committed and answered with 503. This replica reads it back, and answers a repeat."""
    node_id = await api.register()
    writer = api.replica.heartbeats
    execute = writer._execute

    async def commit_and_lose(group: list[object]) -> list[object]:
        await execute(group)  # type: ignore[arg-type]
        raise ConnectionResetError

    with monkeypatch.context() as lossy:
        lossy.setattr(writer, "_execute", commit_and_lose)
        assert (await api.beat(node_id, bootId="b", sequence=1)).status_code == 503
    again = await api.beat(node_id, bootId="b", sequence=1)
    assert again.status_code == 200
    state = api.replica.fleet.get_node(node_id, owner=None).state
    assert state.last_heartbeat is not None
    assert state.last_heartbeat.heartbeat.sequence == 1


async def test_a_writer_that_stumbles_refuses_and_goes_on(api: Api) -> None:
    """Any fault fails the heartbeats of its group, and the next group is committed."""
    node_id, faults = await api.register(), [RuntimeError]

    def stumble_once(_: Heartbeat, __: datetime) -> None:
        if faults:
            raise faults.pop()

    service = api.replica
    own, url = OwnHeartbeats(), service.database.url
    writer = HeartbeatWriter(url, service.fleet, service.clock, own=own, on_commit=stumble_once)
    running = asyncio.create_task(writer.run())
    try:
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(writer.write(heartbeat(node_id)), 5)
        assert await asyncio.wait_for(writer.write(heartbeat(node_id)), 5) is not None
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
