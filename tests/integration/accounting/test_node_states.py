"""States of nodes: the first replica that sees a change writes it once, and uptime is computed from them."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from lucid_compute.accounting.node_states import CLEAN_STATES, SETTLE_TIME, NodeStateRecorder
from lucid_compute.registry.domain.node_state import Receipt
from lucid_compute.registry.fleet.replicas import Outage
from tests import factories
from tests.api import Adjust, Api, without_sweeps
from tests.other_replicas import run_sql

Written = list[tuple[str, datetime]]


@pytest.fixture
def adjust() -> Adjust:
    """The tests sweep themselves."""
    return without_sweeps


@pytest.fixture(autouse=True)
def the_future_is_no_outage(api: Api) -> None:
    """Let the tests' instants lie ahead of the last renewal of the lease."""
    api.replica.fleet.outage_after = timedelta(days=1)


def states_of(api: Api) -> NodeStateRecorder:
    """What a replica would follow with."""
    return NodeStateRecorder(api.replica.database, api.replica.fleet)


async def written(api: Api, node_id: str) -> Written:
    """The node's states and since when, oldest first."""
    rows = await run_sql(api, "SELECT state, since FROM node_states WHERE node_id = $1 ORDER BY since", node_id)
    return [(row["state"], row["since"]) for row in rows]


def hear(api: Api, node_id: str, at: datetime, *, up_since: datetime | None, status: str = "healthy") -> None:
    """Let the node's newest heartbeat be of `at`."""
    fleet = api.replica.fleet
    held = fleet.get_node(node_id, owner=None).state.last_heartbeat
    revision = held.revision + 1 if held else 1
    fleet.apply_receipt(node_id, Receipt(factories.heartbeat(node_id, status=status), at, up_since, revision))


async def follow(states: NodeStateRecorder, at: datetime) -> None:
    """Look twice, as a sweep does, the second time when what was seen first is due."""
    await states.follow(at)
    await states.follow(at + SETTLE_TIME)


async def test_states_are_written_with_the_instants_that_all_replicas_know(api: Api) -> None:
    node_id = await api.register()
    states, begin = states_of(api), api.replica.clock.now()
    await follow(states, begin)
    assert await written(api, node_id) == []
    heard, silent = begin + timedelta(seconds=10), begin + timedelta(seconds=130)
    hear(api, node_id, heard, up_since=heard)
    await follow(states, heard + timedelta(seconds=1))
    await follow(states, silent + timedelta(seconds=1))
    back = begin + timedelta(seconds=200)
    hear(api, node_id, back, up_since=back)
    await follow(states, back + timedelta(seconds=1))
    await follow(states, back + timedelta(seconds=11))
    assert await written(api, node_id) == [("healthy", heard), ("unhealthy", silent), ("healthy", back)]
    hear(api, node_id, later := back + timedelta(seconds=30), up_since=back, status="draining")
    await follow(states, later)
    hear(api, node_id, last := later + timedelta(seconds=30), up_since=back)
    await follow(states, last + timedelta(seconds=1))
    assert (await written(api, node_id))[3:] == [("draining", later), ("healthy", last + timedelta(seconds=1))]


@pytest.mark.parametrize("is_reported", [True, False])
async def test_a_silent_drain_is_unhealthy_and_not_in_the_uptime(api: Api, is_reported: bool) -> None:
    """Counted among unhealthy nodes, and left out of the node's uptime as its drain was."""
    node_id = await api.register()
    states, begin = states_of(api), api.replica.clock.now() - timedelta(seconds=300)
    hear(api, node_id, begin, up_since=begin)
    await follow(states, begin)
    drained = begin + timedelta(seconds=60)
    if not is_reported:
        await api.http.post(f"/compute/drain/{node_id}")
        await run_sql(api, "UPDATE nodes SET draining_since = $2 WHERE passport_id = $1", node_id, drained)
    hear(api, node_id, drained, up_since=begin, status="draining" if is_reported else "healthy")
    await follow(states, drained)
    await follow(states, drained + timedelta(seconds=121))
    found = await written(api, node_id)
    assert [state for state, _ in found] == ["healthy", "draining", "stopped"]
    assert found[2][1] == drained + timedelta(seconds=120)
    uptime = (await api.http.get(f"/compute/uptime/{node_id}")).json()["windows"][0]
    assert (uptime["uptime"], uptime["unhealthySeconds"]) == (1.0, 0.0)
    assert uptime["drainingSeconds"] >= 235
    await run_sql(api, "UPDATE record_marks SET began_at = now() - interval '1 day'")
    query = {"from": "-2m", "series": "nodesUnhealthy,nodesDraining", "step": "1m"}
    series = (await api.http.get("/compute/metrics", params=query)).json()["series"]
    assert (series["nodesUnhealthy"][-2], series["nodesDraining"][-2]) == (1.0, 0.0)


async def test_an_outage_of_ours_puts_off_when_a_silent_node_is_unhealthy(api: Api) -> None:
    node_id = await api.register()
    states, begin = states_of(api), api.replica.clock.now()
    hear(api, node_id, begin, up_since=begin)
    await follow(states, begin + timedelta(seconds=1))
    away = [Outage(begin + timedelta(seconds=60), begin + timedelta(seconds=100))]
    away += [Outage(begin + timedelta(seconds=140), begin + timedelta(seconds=240))]
    api.replica.fleet.apply_outages(away)
    found: Written = []
    await states.find_changes(begin + timedelta(seconds=300))
    for change in await states.find_changes(begin + timedelta(seconds=306)):
        found.append((change.state, change.since))
    assert found == [("unhealthy", begin + timedelta(seconds=260))]


async def test_two_replicas_write_a_change_once_and_one_that_is_behind_writes_nothing(api: Api) -> None:
    node_id = await api.register()
    one, other, begin = states_of(api), states_of(api), api.replica.clock.now()
    hear(api, node_id, begin, up_since=begin)
    for states in (one, other):
        await states.follow(begin + timedelta(seconds=1))
    due = begin + timedelta(seconds=1) + SETTLE_TIME
    await asyncio.gather(one.follow(due), other.follow(due))
    for states in (one, other):
        await states.follow(due)
    assert await written(api, node_id) == [("healthy", begin)]
    # Another replica heard the node after a silence that this one still believes in.
    back = begin + timedelta(seconds=150)
    await run_sql(
        api,
        "INSERT INTO node_states VALUES ($1, $2, 'unhealthy', 'acme'), ($1, $3, 'healthy', 'acme')",
        node_id,
        begin + timedelta(seconds=120),
        back,
    )
    await follow(one, begin + timedelta(seconds=160))
    assert [state for state, _ in await written(api, node_id)] == ["healthy", "unhealthy", "healthy"]
    await one.refresh()
    hear(api, node_id, back, up_since=back)
    await follow(one, begin + timedelta(seconds=170))
    assert len(await written(api, node_id)) == 3


async def test_what_a_dead_replica_did_not_write_another_does(api: Api) -> None:
    """It wrote that the node was unhealthy, and died before it came back."""
    node_id = await api.register()
    states, begin = states_of(api), api.replica.clock.now()
    hear(api, node_id, begin, up_since=begin)
    await follow(states, begin + timedelta(seconds=1))
    await run_sql(
        api,
        "INSERT INTO node_states VALUES ($1, $2, 'unhealthy', 'acme')",
        node_id,
        begin + timedelta(seconds=2),
    )
    await states.refresh()
    await follow(states, begin + timedelta(seconds=10))
    assert [state for state, _ in await written(api, node_id)] == ["healthy", "unhealthy", "healthy"]


async def test_a_state_that_lasts_less_than_five_seconds_is_none(api: Api) -> None:
    node_id = await api.register()
    states, begin = states_of(api), api.replica.clock.now()
    hear(api, node_id, begin, up_since=begin)
    await follow(states, begin + timedelta(seconds=1))
    hear(api, node_id, begin, up_since=None, status="unhealthy")
    await states.follow(begin + timedelta(seconds=10))
    hear(api, node_id, begin + timedelta(seconds=12), up_since=begin + timedelta(seconds=12))
    await follow(states, begin + timedelta(seconds=13))
    assert [state for state, _ in await written(api, node_id)] == ["healthy"]


async def test_old_states_are_deleted_except_the_one_at_the_start_of_the_kept_time(api: Api) -> None:
    node_id = await api.register()
    for days, state in ((100, "healthy"), (95, "unhealthy"), (91, "healthy"), (10, "unhealthy")):
        await run_sql(
            api,
            "INSERT INTO node_states VALUES ($1, now() - $2 * interval '1 day', $3, 'acme')",
            node_id,
            days,
            state,
        )
    await run_sql(api, CLEAN_STATES, 90)
    assert [state for state, _ in await written(api, node_id)] == ["healthy", "unhealthy"]
