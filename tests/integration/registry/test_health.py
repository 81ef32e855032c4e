"""GET /compute/health/{id} and the table of one clock and two questions."""

from __future__ import annotations

import pytest

from lucid_compute.registry.domain.node_state import NodeState
from lucid_compute.registry.matching_engine import is_healthy
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code
from tests.other_replicas import let_pass, run_sql, until

FIELDS = [
    "passportId",
    "status",
    "fresh",
    "stopped",
    "uptimeSeconds",
    "jobsCompleted",
    "avgLatencyMs",
    "errorRate",
    "lastHeartbeatAt",
    "heartbeatAgeSeconds",
    "load",
    "queueDepth",
    "inFlight",
    "drained",
    "availableModels",
    "reasons",
    "reported",
]


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; a node may send any number of heartbeats."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)


async def codes(api: Api, node: str) -> set[str]:
    """The codes of a node's reasons."""
    return {reason["code"] for reason in (await api.health(node))["reasons"]}


async def test_a_node_that_was_never_heard_of_is_unhealthy(api: Api) -> None:
    health = await api.health(await api.register())
    assert sorted(health) == sorted(FIELDS)
    assert (health["status"], health["fresh"], health["uptimeSeconds"]) == ("unhealthy", False, 0)
    unknown = ("avgLatencyMs", "errorRate", "lastHeartbeatAt", "heartbeatAgeSeconds", "load", "queueDepth", "reported")
    assert {key for key in FIELDS if health[key] is None} == set(unknown)
    assert (health["jobsCompleted"], health["inFlight"], health["drained"]) == (0, 0, False)
    assert [reason["code"] for reason in health["reasons"]] == ["HEARTBEAT_MISSING"]


async def test_a_fresh_healthy_node_is_healthy_and_has_no_reasons(api: Api) -> None:
    node = await api.register()
    await api.beat(node, load=0.25, queueDepth=3, availableModels=["m"])
    health = await api.health(node)
    assert (health["status"], health["fresh"], health["reasons"]) == ("healthy", True, [])
    assert (health["load"], health["queueDepth"], health["availableModels"]) == (0.25, 3, ["m"])
    assert 0 <= health["heartbeatAgeSeconds"] < 5
    assert 0 <= health["uptimeSeconds"] < 5


@pytest.mark.parametrize(
    ("age_seconds", "status", "fresh", "reasons"),
    [
        (25, "healthy", True, set()),
        (31, "healthy", False, {"HEARTBEAT_STALE"}),
        (110, "healthy", False, {"HEARTBEAT_STALE"}),
        (150, "unhealthy", False, {"HEARTBEAT_STALE"}),
    ],
)
async def test_age_decides_both_questions(
    api: Api, age_seconds: int, status: str, fresh: bool, reasons: set[str]
) -> None:
    node = await api.register()
    await api.beat(node)
    await let_pass(api, node, age_seconds)
    health = await api.health(node)
    assert (health["status"], health["fresh"]) == (status, fresh)
    assert age_seconds <= health["heartbeatAgeSeconds"] < age_seconds + 5
    assert await codes(api, node) == reasons
    (listed,) = (await api.http.get(f"/compute?status={status}")).json()["nodes"]
    assert (listed["id"], listed["health"]["fresh"]) == (node, fresh)


async def test_a_node_that_reports_unhealthy_is_unhealthy_whatever_its_age(api: Api) -> None:
    node = await api.register()
    await api.beat(node, status="unhealthy")
    health = await api.health(node)
    assert (health["status"], health["fresh"], health["uptimeSeconds"]) == ("unhealthy", True, 0)
    assert await codes(api, node) == {"REPORTED_UNHEALTHY"}
    await let_pass(api, node, 40)
    assert await codes(api, node) == {"REPORTED_UNHEALTHY", "HEARTBEAT_STALE"}


@pytest.mark.parametrize(
    ("age_seconds", "drained_by", "status"),
    [
        (110, "operator", "draining"),
        (110, "node", "draining"),
        (150, "operator", "unhealthy"),  # vanished
        (150, "operator of an unhealthy one", "unhealthy"),
        (150, "node", "unhealthy"),  # a planned stop
        (150, "operator and node", "unhealthy"),
    ],
)
async def test_silence_beats_a_drain_and_a_planned_stop_is_told_from_a_vanished_node(
    api: Api, age_seconds: int, drained_by: str, status: str
) -> None:
    node = await api.register()
    reported = "draining" if "node" in drained_by else "unhealthy" if "unhealthy" in drained_by else "healthy"
    await api.beat(node, status=reported)
    if "operator" in drained_by:
        await api.http.post(f"/compute/drain/{node}")
    await let_pass(api, node, age_seconds)
    health, stopped = await api.health(node), status == "unhealthy" and "node" in drained_by
    assert (health["status"], health["fresh"], health["stopped"]) == (status, False, stopped)
    assert {"DRAINING", "HEARTBEAT_STALE"} <= await codes(api, node)
    for wanted in ("healthy", "unhealthy", "draining"):
        listed = (await api.http.get(f"/compute?status={wanted}")).json()["nodes"]
        assert [entry["health"]["stopped"] for entry in listed] == ([stopped] if wanted == status else [])
    nodes = (await api.http.get("/compute/overview")).json()["nodes"]
    assert nodes == {"total": 1, "healthy": 0, "unhealthy": 0, "draining": 0, "fresh": 0, status: 1}
    scraped = (await api.http.get("/metrics")).text
    assert f'lucid_nodes{{status="{status}"}} 1.0' in scraped
    assert f"lucid_nodes_stopped {float(stopped)}" in scraped


async def test_a_drained_node_that_was_never_heard_is_unhealthy_and_still_drained(api: Api) -> None:
    node = await api.register()
    drained = (await api.http.post(f"/compute/drain/{node}")).json()
    assert (drained["status"], drained["drained"]) == ("draining", True)
    health = await api.health(node)
    assert (health["status"], health["stopped"], health["drained"]) == ("unhealthy", False, True)
    assert await codes(api, node) == {"DRAINING", "HEARTBEAT_MISSING"}


async def test_a_stopped_node_that_comes_back_has_stopped_no_more(api: Api) -> None:
    node = await api.register()
    await api.beat(node, status="draining")
    await let_pass(api, node, 150)
    assert (await api.health(node))["stopped"] is True
    await api.beat(node)
    health = await api.health(node)
    assert (health["status"], health["stopped"], health["reasons"]) == ("healthy", False, [])


async def test_the_clients_clock_says_nothing(api: Api) -> None:
    node = await api.register()
    for sent_at in ("1999-01-01T00:00:00Z", "2099-01-01T00:00:00+05:00"):
        await api.beat(node, sentAt=sent_at)
        health = await api.health(node)
        assert (health["status"], health["fresh"]) == ("healthy", True)
        assert health["heartbeatAgeSeconds"] < 5
    assert health["reported"]["sentAt"] == "2098-12-31T19:00:00.000Z"


async def test_a_client_that_beats_every_thirty_seconds_stays_up(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    await run_sql(api, "UPDATE heartbeats SET up_since = clock_timestamp() - interval '1 hour'")
    await let_pass(api, node, 30.5)
    await api.beat(node)
    health = await api.health(node)
    assert health["fresh"] is True
    assert 3600 <= health["uptimeSeconds"] < 3620


async def test_uptime_counts_from_the_first_heartbeat_since_the_node_was_last_unhealthy(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    await run_sql(api, "UPDATE heartbeats SET up_since = clock_timestamp() - interval '1 hour'")
    await let_pass(api, node, 200)
    assert (await api.health(node))["uptimeSeconds"] == 0
    await api.beat(node)
    assert (await api.health(node))["uptimeSeconds"] < 5
    await api.beat(node, status="unhealthy")
    await api.beat(node)
    assert (await api.health(node))["uptimeSeconds"] < 5


async def test_an_outage_of_the_registry_is_taken_off_the_longer_age_and_uptime_never_off_freshness(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    await run_sql(api, "UPDATE heartbeats SET up_since = clock_timestamp() - interval '400 seconds'")
    await let_pass(api, node, 300)
    assert (await api.health(node))["status"] == "unhealthy"
    await run_sql(
        api,
        "INSERT INTO outages (started_at, ended_at) "
        "VALUES (clock_timestamp() - interval '290 seconds', clock_timestamp() - interval '50 seconds')",
    )

    async def is_healthy() -> bool:
        return bool((await api.health(node))["status"] == "healthy")

    await until(is_healthy)
    health = await api.health(node)
    assert health["fresh"] is False
    assert 160 <= health["uptimeSeconds"] < 170


async def test_what_is_in_flight_is_what_this_service_routed(api: Api) -> None:
    node = await api.register()
    await api.beat(node, inFlight=9, jobsCompleted=100, avgLatencyMs=5)
    api.replica.fleet.replicas.own_in_flight[node] = 2
    health = await api.health(node)
    assert (health["inFlight"], health["jobsCompleted"], health["avgLatencyMs"]) == (2, 0, None)
    assert (health["reported"]["inFlight"], health["reported"]["jobsCompleted"]) == (9, 100)


async def test_a_deprecated_passport_is_a_reason(api: Api) -> None:
    node = await api.register()

    def state_of() -> NodeState:
        return api.replica.fleet.get_node(node, owner=None).state

    await api.beat(node)
    await api.http.patch(f"/passports/{node}", json={"status": "deprecated"})
    assert await codes(api, node) == {"PASSPORT_INACTIVE"}
    assert not is_healthy(state_of(), api.replica.clock.now())
    await api.http.patch(f"/passports/{node}", json={"status": "active"})
    assert await codes(api, node) == set()
    assert is_healthy(state_of(), api.replica.clock.now())


async def test_an_ended_node_has_no_health(api: Api) -> None:
    deregistered, revoked = await api.register("a"), await api.register("b")
    await api.http.post(f"/compute/deregister/{deregistered}")
    await api.http.delete(f"/passports/{revoked}")
    for node in (deregistered, revoked):
        answer = await api.http.get(f"/compute/health/{node}")
        assert (answer.status_code, error_code(answer)) == (410, "NODE_DEREGISTERED")
