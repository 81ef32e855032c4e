"""The sweep records transitions as events, and decides nothing."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.domain.node_state import Receipt, ReportedStatus
from lucid_compute.registry.fleet.replicas import Outage
from lucid_compute.registry.keys.store import KeyStore
from lucid_compute.registry.sweep import BRAKE_FLEET, BRAKE_LIMIT, Brake, Sweep
from tests.api import Adjust, Api, without_sweeps
from tests.factories import NOW
from tests.other_replicas import run_sql


def age(api: Api, node_id: str, seconds: float, status: ReportedStatus = ReportedStatus.HEALTHY) -> None:
    """Make the node's newest heartbeat so old and of that status, in this replica's memory."""
    fleet = api.replica.fleet
    receipt = fleet.get_node(node_id, owner=None).state.last_heartbeat
    assert receipt is not None
    received_at = api.replica.clock.now() - timedelta(seconds=seconds)
    heartbeat = receipt.heartbeat.model_copy(update={"status": status})
    fleet.apply_receipt(node_id, Receipt(heartbeat, received_at, received_at, receipt.revision + 1))


async def sweep(api: Api) -> None:
    """Sweep once, and wait for the feed to bring what was recorded."""
    await api.replica.sweep.record(await api.replica.sweep.find_transitions())
    await api.replica.feed.catch_up()


async def told(api: Api, node_id: str) -> list[str]:
    """The types of the node's events, oldest first."""
    events = (await api.http.get(f"/compute/events/{node_id}", params={"perPage": 100})).json()["events"]
    return [event["type"] for event in reversed(events)]


@pytest.fixture
def adjust() -> Adjust:
    """The tests sweep themselves."""
    return without_sweeps


async def test_a_node_is_told_of_as_it_falls_silent_and_comes_back(api: Api) -> None:
    """Healthy, stale after 35 s, unhealthy after 120 s; nothing twice."""
    node_id = await api.register()
    await sweep(api)
    assert await told(api, node_id) == ["registered"]
    await api.beat(node_id)
    for seconds, expected in (
        (0, ["registered", "healthy"]),
        (33, ["registered", "healthy"]),
        (36, ["registered", "healthy", "stale"]),
        (119, ["registered", "healthy", "stale"]),
        (121, ["registered", "healthy", "stale", "unhealthy"]),
    ):
        age(api, node_id, seconds)
        await sweep(api)
        await sweep(api)
        assert await told(api, node_id) == expected, seconds


async def test_a_node_that_flaps_tells_of_little(api: Api) -> None:
    """No `stale` event after three events in ten minutes; health stays correct anyway."""
    node_id = await api.register()
    await api.beat(node_id)
    for seconds in (0, 36, 0, 36, 0, 36):
        age(api, node_id, seconds)
        await sweep(api)
    assert (await told(api, node_id))[1:] == ["healthy", "stale", "healthy"]
    assert (await api.health(node_id))["fresh"] is False


async def test_a_recovery_is_never_late(api: Api) -> None:
    """However new the node is and however many events it had: the next sweep records its recovery."""
    node_id = await api.register()
    await api.beat(node_id)
    for seconds in (0, 36, 121, 0):
        age(api, node_id, seconds)
        await sweep(api)
    assert (await told(api, node_id))[1:] == ["healthy", "stale", "unhealthy", "healthy"]


async def test_a_node_that_wavered_and_dies_is_called_unhealthy_in_time(api: Api) -> None:
    """`stale` events may not use up the allowance of `unhealthy` ones."""
    node_id = await api.register()
    await api.beat(node_id)
    for seconds in (0, 36, 0, 36, 121):
        age(api, node_id, seconds)
        await sweep(api)
    assert (await told(api, node_id))[1:] == ["healthy", "stale", "healthy", "unhealthy"]


async def test_a_node_that_dies_again_and_again_is_called_unhealthy_twice_in_ten_minutes(api: Api) -> None:
    """And healthy after each. The next one is recorded when the first is old enough, if the node is still unhealthy."""
    node_id = await api.register()
    await api.beat(node_id)
    await sweep(api)
    for status in ("unhealthy", "healthy", "unhealthy", "healthy", "unhealthy"):
        assert (await api.beat(node_id, status=status)).status_code == 200
        await sweep(api)
    assert (await told(api, node_id))[1:] == ["healthy", *["unhealthy", "healthy"] * 2]
    await run_sql(api, "UPDATE node_events SET at = at - interval '11 minutes'")
    await sweep(api)
    assert (await told(api, node_id))[6:] == ["unhealthy"]


async def test_a_drain_is_told_of_until_it_is_done(api: Api) -> None:
    """`drained` is an event of its own; a resume makes the node healthy again."""
    node_id = await api.register()
    await api.beat(node_id)
    await sweep(api)
    await api.http.post(f"/compute/drain/{node_id}")
    await sweep(api)
    await api.http.post(f"/compute/resume/{node_id}")
    await sweep(api)
    assert await told(api, node_id) == ["registered", "healthy", "draining", "drained", "resumed", "healthy"]


async def test_a_node_that_reports_draining_is_told_of(api: Api) -> None:
    """The drain is the node's own, and the event says so."""
    node_id = await api.register()
    await api.beat(node_id)
    await sweep(api)
    api.replica.fleet.replicas.own_in_flight[node_id] = 1
    await api.beat(node_id, status="draining")
    await sweep(api)
    events = (await api.http.get(f"/compute/events/{node_id}")).json()["events"]
    assert (events[0]["type"], events[0]["reason"]) == ("draining", "reported by the node")


async def test_a_planned_stop_is_told_of_once_and_is_no_alarm(api: Api) -> None:
    """Drained first, then stopped; its return is told as any other."""
    node_id = await api.register()
    await api.beat(node_id)
    await sweep(api)
    age(api, node_id, 125, ReportedStatus.DRAINING)  # no sweep ran in between
    for _ in range(3):
        await sweep(api)
    assert await told(api, node_id) == ["registered", "healthy", "drained", "stopped"]
    (stopped,) = (await api.http.get(f"/compute/events/{node_id}?type=stopped")).json()["events"]
    assert stopped["reason"].startswith("it said that it stops; no heartbeat for 12")
    age(api, node_id, 4000, ReportedStatus.DRAINING)
    await sweep(api)
    age(api, node_id, 0)
    await sweep(api)
    assert (await told(api, node_id))[4:] == ["healthy"]


async def test_a_node_that_is_started_and_stopped_again_and_again_tells_of_one_stop_in_ten_minutes(api: Api) -> None:
    """And a stop takes nothing from the allowance of stale events."""
    node_id = await api.register()
    await api.beat(node_id)
    for _ in range(3):
        age(api, node_id, 0)
        await sweep(api)
        for seconds in (0, 125):
            age(api, node_id, seconds, ReportedStatus.DRAINING)
            await sweep(api)
    assert (await told(api, node_id))[1:] == ["healthy", "drained", "stopped", *["healthy", "drained"] * 2]


async def test_a_drained_node_that_vanishes_is_an_alarm(api: Api) -> None:
    """It never said that it stops: its operator drains it, and it is gone."""
    node_id = await api.register()
    await api.beat(node_id)
    await api.http.post(f"/compute/drain/{node_id}")
    changed = "revision = revision + 1, changed_xid = pg_current_xact_id()"
    await run_sql(api, f"UPDATE nodes SET draining_since = now() - interval '1 hour', {changed}")
    await sweep(api)
    age(api, node_id, 119)
    await sweep(api)
    await sweep(api)
    assert await told(api, node_id) == ["registered", "draining", "drained"]
    age(api, node_id, 121)
    for _ in range(3):
        await sweep(api)
    assert (await told(api, node_id))[3:] == ["unhealthy"]


async def test_a_node_that_vanished_and_is_drained_then_is_drained_and_no_second_alarm(api: Api) -> None:
    """Whoever waits for `drained` gets it, although the node is silent; also for a node that was never heard."""
    node_id, unheard = await api.register(), await api.register("unheard")
    await api.beat(node_id)
    age(api, node_id, 150)
    await sweep(api)
    for node in (node_id, unheard):
        await api.http.post(f"/compute/drain/{node}")
    for _ in range(3):
        await sweep(api)
    assert await told(api, node_id) == ["registered", "unhealthy", "draining", "drained"]
    assert await told(api, unheard) == ["registered", "draining", "drained"]


async def test_two_replicas_tell_of_a_transition_once(api: Api) -> None:
    """Both see it; one event is written."""
    node_id = await api.register()
    await api.beat(node_id)
    transitions = await api.replica.sweep.find_transitions()
    assert len(transitions) == 1
    await asyncio.gather(*(api.replica.sweep.record(transitions) for _ in range(4)))
    assert await told(api, node_id) == ["registered", "healthy"]


async def test_a_node_that_departs_during_a_sweep_gets_no_event_after_its_end(api: Api, database_url: str) -> None:
    """The sweep does not wait for the departure's locks, and the departure not for the sweep's: no deadlock."""
    node_id = await api.register()
    await api.beat(node_id)
    await sweep(api)
    age(api, node_id, 121)
    transitions = await api.replica.sweep.find_transitions()
    assert [transition.state for transition in transitions] == ["unhealthy"]
    connection = await connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM passports WHERE id = $1 FOR UPDATE", node_id)
            async with asyncio.timeout(1):
                await api.replica.sweep.record(transitions)
            await connection.execute("SELECT FROM nodes WHERE passport_id = $1 FOR UPDATE", node_id)
            await connection.execute("UPDATE passports SET deregistered_at = now() WHERE id = $1", node_id)
        await api.replica.sweep.record(transitions)
    finally:
        await connection.close()
    assert await told(api, node_id) == ["registered", "healthy"]


async def test_an_outage_of_ours_is_told_of_by_no_node(api: Api) -> None:
    """Nodes that were silent only while we were away are neither stale nor counted by the brake; late ones are."""
    nodes = [await api.register(f"node-{number}") for number in range(BRAKE_FLEET)]
    for node_id in nodes:
        await api.beat(node_id)
    await sweep(api)
    for node_id in nodes:
        age(api, node_id, 309)
    now = api.replica.clock.now()
    api.replica.fleet.apply_outages([Outage(now - timedelta(seconds=305), now - timedelta(seconds=5))])
    assert await api.replica.sweep.find_transitions() == []
    assert not api.replica.sweep.brake.is_on(now)
    assert (await api.health(nodes[0]))["fresh"] is False

    age(api, nodes[0], 341)
    late = await api.replica.sweep.find_transitions()
    assert [(transition.passport_id, transition.state) for transition in late] == [(nodes[0], "stale")]
    for node_id in nodes[1:5]:
        age(api, node_id, 341)
    assert await api.replica.sweep.find_transitions() == []
    assert api.replica.sweep.brake.is_on(now)


async def test_a_step_that_fails_holds_no_other_up(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """A follower that can't reach the database is logged once; events, and the followers after it, go on."""
    followed = asyncio.Event()

    class Unreachable:
        async def refresh(self) -> None:
            raise DatabaseUnavailable

        async def follow(self, now: datetime, *, is_doubtful: bool) -> None:  # noqa: ARG002 - a follower's signature
            raise DatabaseUnavailable

    class Next:
        async def refresh(self) -> None:
            pass

        async def follow(self, now: datetime, *, is_doubtful: bool) -> None:  # noqa: ARG002 - a follower's signature
            rounds.append(now)
            if len(rounds) > 2:
                followed.set()

    rounds: list[datetime] = []
    node_id = await api.register()
    await api.beat(node_id)
    replica = api.replica
    own = Sweep(
        replica.database,
        replica.fleet,
        replica.clock,
        replica.key_store,
        [Unreachable(), Next()],
        interval_seconds=0.01,
    )
    task = asyncio.create_task(own.run())
    async with asyncio.timeout(10):
        await followed.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await told(api, node_id) == ["registered", "healthy"]
    assert sum("'Unreachable'" in record.message for record in caplog.records) == 1


async def test_keys_used_are_stored_however_many_they_are_and_not_lost_by_a_failure(api: Api) -> None:
    """More than a statement has parameters. When the database can't be reached, the next call stores them."""
    made = await api.http.post("/keys", json={"name": "k", "owner": "acme", "scopes": ["compute"]})
    ring, key_id = api.replica.keys, made.json()["id"]
    ring.used_ids = {key_id, *(f"key-{number}" for number in range(40_000))}
    gone = KeyStore(Database("postgresql://nobody@127.0.0.1:1/none"), ring)
    with pytest.raises(DatabaseUnavailable):
        await gone.record_used()
    assert key_id in ring.used_ids
    await api.replica.key_store.record_used()
    assert not ring.used_ids
    keys = (await api.http.get("/keys", params={"owner": "acme"})).json()["keys"]
    assert keys[0]["lastUsedAt"] is not None


def test_events_of_silence_wait_while_a_third_of_the_fleet_falls_silent() -> None:
    """The fault is more likely ours; the brake is released automatically, after five minutes at the latest."""
    brake = Brake()
    present, silent = timedelta(seconds=5), timedelta(seconds=50)
    assert not brake.watch([silent] * 9, NOW)
    assert not brake.watch([present] * 7 + [silent] * 3, NOW)
    assert brake.watch([present] * 6 + [silent] * 4, NOW)
    later = NOW + timedelta(seconds=60)
    assert brake.watch([present] * 6 + [silent + timedelta(seconds=60)] * 4, later)
    assert not brake.watch([present] * 10, later)
    assert brake.watch([silent] * 10, later)
    too_late = later + BRAKE_LIMIT + timedelta(seconds=1)
    assert not brake.watch([silent + BRAKE_LIMIT] * 10, too_late)
