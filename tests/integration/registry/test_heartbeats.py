"""POST /compute/heartbeat: what it takes, what it answers, and what it can't undo."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.express_client import Entrance, FastPath
from tests.other_replicas import run_sql

ANSWER = ["passportId", "status", "receivedAt", "freshUntil", "unhealthyAt", "nextHeartbeatInSeconds", "drain"]
EVERYTHING: dict[str, Any] = {
    "bootId": "boot-1",
    "sequence": 7,
    "sentAt": "2026-01-01T12:00:00.000Z",
    "inFlight": 2,
    "runtime": {"name": "vllm", "version": "0.9"},
    "gpus": [
        {
            "index": 0,
            "name": "NVIDIA A100",
            "utilization": 0.5,
            "memoryUsedMb": 1024.5,
            "memoryTotalMb": 81920,
            "temperatureC": 61,
            "powerW": 250.0,
        }
    ],
    "jobsCompleted": 10,
    "jobsFailed": 1,
    "avgLatencyMs": 12.5,
    "tokensGenerated": 2**40,
}


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; a node may send any number of heartbeats."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


def fault_paths(answer: Any) -> list[str]:
    """The places that an INVALID_REQUEST names."""
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST"), answer.text
    return [fault["path"] for fault in answer.json()["error"]["details"]["fields"]]


async def test_a_heartbeat_is_answered_with_when_the_next_is_due(api: Api) -> None:
    node = await api.register()
    answer = await api.beat(node)
    assert answer.status_code == 200
    beat = answer.json()
    assert sorted(beat) == sorted(ANSWER)
    assert (beat["passportId"], beat["status"], beat["drain"]) == (node, "healthy", False)
    received, fresh, unhealthy = (datetime.fromisoformat(beat[key]) for key in ANSWER[2:5])
    assert (fresh - received, unhealthy - received) == (timedelta(seconds=30), timedelta(seconds=120))
    assert (await api.health(node))["lastHeartbeatAt"] == beat["receivedAt"]
    stored = await run_sql(api, "SELECT received_at FROM heartbeats WHERE passport_id = $1", node)
    assert abs(stored[0][0] - received) < timedelta(milliseconds=1)
    due = {(await api.beat(node)).json()["nextHeartbeatInSeconds"] for _ in range(20)}
    assert all(8.1 <= seconds <= 9.9 for seconds in due)
    assert len(due) > 10


async def test_everything_that_a_node_says_of_itself_stands_under_reported(api: Api) -> None:
    node = await api.register()
    assert (await api.beat(node, load=0.25, queueDepth=3, **EVERYTHING)).status_code == 200
    reported = (await api.health(node))["reported"]
    assert {key: reported[key] for key in EVERYTHING} == EVERYTHING
    assert (reported["status"], reported["load"], reported["queueDepth"]) == ("healthy", 0.25, 3)


async def test_unknown_is_null_and_never_0(api: Api) -> None:
    node = await api.register()
    assert (await api.beat(node, load=None, queueDepth=None)).status_code == 200
    health = await api.health(node)
    assert (health["load"], health["queueDepth"]) == (None, None)
    kept = {key: value for key, value in health["reported"].items() if value is not None}
    assert kept == {"status": "healthy"}
    assert (await api.beat(node, load=0, queueDepth=0, inFlight=0)).status_code == 200
    health = await api.health(node)
    assert (health["load"], health["queueDepth"], health["reported"]["inFlight"]) == (0, 0, 0)


async def test_unknown_fields_are_ignored_wherever_they_stand(api: Api) -> None:
    node = await api.register()
    newer = {"mood": {"today": ["fine"]}, "gpus": [{"index": 0, "fans": 3}], "runtime": {"name": "vllm", "build": "x"}}
    assert (await api.beat(node, **newer)).status_code == 200
    reported = (await api.health(node))["reported"]
    assert "mood" not in reported
    assert reported["runtime"] == {"name": "vllm", "version": None}


async def test_a_number_that_postgres_cannot_read_holds_no_heartbeat_up(api: Api) -> None:
    """JSON allows any exponent: those of its group are written out again, and all are committed."""
    nodes = [await api.register(name) for name in "abc"]
    whole = {"passportId": nodes[0], "status": "healthy", "load": 0.125, "availableModels": [], "queueDepth": 7}
    strange = json.dumps(whole).replace("0.125", "0e2000000000")
    answers = await asyncio.gather(
        api.http.post("/compute/heartbeat", content=strange), *(api.beat(node, queueDepth=7) for node in nodes[1:])
    )
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [(await api.health(node))["queueDepth"] for node in nodes] == [7] * 3
    stored = await run_sql(api, "SELECT report->>'load' FROM heartbeats WHERE passport_id = $1", nodes[0])
    assert stored[0][0] in {"0", "0.0"}


async def test_load_and_queue_depth_status_and_models_must_be_sent(api: Api) -> None:
    node = await api.register()
    whole = {"passportId": node, "status": "healthy", "load": 0.5, "availableModels": [], "queueDepth": 0}
    for field in whole:
        body = {key: value for key, value in whole.items() if key != field}
        assert fault_paths(await api.http.post("/compute/heartbeat", json=body)) == [field]
    assert (await api.http.post("/compute/heartbeat", json=whole)).status_code == 200


async def test_a_heartbeat_out_of_bounds_is_refused_where_it_is(api: Api) -> None:
    node = await api.register()
    for changes, path in (
        ({"load": 1.01}, "load"),
        ({"load": -0.01}, "load"),
        ({"load": "0.5"}, "load"),
        ({"load": True}, "load"),
        ({"queueDepth": -1}, "queueDepth"),
        ({"queueDepth": 1.5}, "queueDepth"),
        ({"status": "fine"}, "status"),
        ({"status": None}, "status"),
        ({"status": "deregistered"}, "status"),
        ({"availableModels": None}, "availableModels"),
        ({"availableModels": "m"}, "availableModels"),
        ({"availableModels": ["m", 5]}, "availableModels.1"),
        ({"availableModels": [""]}, "availableModels.0"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": 2**63}, "sequence"),
        ({"sentAt": "yesterday"}, "sentAt"),
        ({"sentAt": 1735732800}, "sentAt"),
        ({"gpus": [{"index": 0}, {"index": 1, "utilization": 2}]}, "gpus.1.utilization"),
        ({"runtime": "vllm"}, "runtime"),
        ({"jobsCompleted": -1}, "jobsCompleted"),
    ):
        assert fault_paths(await api.beat(node, **changes)) == [path], changes
    assert fault_paths(await api.beat(node, load=2, queueDepth=-1)) == ["load", "queueDepth"]
    for load in (0, 1, 0.0, 1.0):
        assert (await api.beat(node, load=load)).status_code == 200
    assert (await api.health(node))["reported"]["sequence"] is None


async def test_who_may_not_beat_for_a_node_learns_nothing_of_it(api: Api) -> None:
    node, ended, revoked = await api.register("a"), await api.register("b"), await api.register("c")
    await api.http.post(f"/compute/deregister/{ended}")
    await api.http.delete(f"/passports/{revoked}")
    for passport_id, status, code in (
        ("7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11", 404, "NODE_NOT_FOUND"),
        ("nonsense", 404, "NODE_NOT_FOUND"),
        (ended, 410, "NODE_DEREGISTERED"),
        (revoked, 410, "NODE_DEREGISTERED"),
    ):
        answer = await api.beat(passport_id)
        assert (answer.status_code, error_code(answer)) == (status, code)
    reader = await api.new_key("admin", ["passports:read", "inference:run", "passports:write"])
    assert (await reader.beat(node)).status_code == 403
    assert (await api.with_key(None).beat(node)).status_code == 401
    assert (await api.health(node))["lastHeartbeatAt"] is None


async def test_an_older_or_repeated_heartbeat_changes_nothing_and_answers_the_current_state(api: Api) -> None:
    node = await api.register()
    first = (await api.beat(node, bootId="b", sequence=5, load=0.5)).json()
    for sequence in (5, 4, 0):
        again = await api.beat(node, bootId="b", sequence=sequence, load=0.9, status="unhealthy")
        assert again.status_code == 200
        assert (again.json()["receivedAt"], again.json()["status"]) == (first["receivedAt"], "healthy")
    health = await api.health(node)
    assert (health["load"], health["reported"]["sequence"]) == (0.5, 5)
    newer = (await api.beat(node, bootId="b", sequence=6, load=0.6)).json()
    assert newer["receivedAt"] > first["receivedAt"]
    assert (await api.health(node))["load"] == 0.6


async def test_a_later_heartbeat_of_a_boot_that_is_repeated_changes_nothing(api: Api) -> None:
    """The first of a boot is not the only one that is remembered."""
    node = await api.register()
    for sequence, load in ((1, 0.1), (2, 0.2)):
        assert (await api.beat(node, bootId="b", sequence=sequence, load=load)).status_code == 200
    for sequence in (2, 1):
        assert (await api.beat(node, bootId="b", sequence=sequence, load=0.9)).status_code == 200
        health = await api.health(node)
        assert (health["load"], health["reported"]["sequence"]) == (0.2, 2)


async def test_a_new_boot_starts_sequences_afresh_and_a_former_one_is_refused_for_good(api: Api) -> None:
    node = await api.register()
    await api.beat(node, bootId="one", sequence=100)
    assert (await api.beat(node, bootId="two", sequence=1, load=0.2)).status_code == 200
    assert (await api.health(node))["load"] == 0.2
    for sequence in (101, 1000):
        assert fault_paths(await api.beat(node, bootId="one", sequence=sequence, load=0.9)) == ["bootId"]
    assert (await api.beat(node, bootId="three", sequence=0)).status_code == 200
    for boot in ("one", "two"):
        assert fault_paths(await api.beat(node, bootId=boot, sequence=2**40)) == ["bootId"]
    assert (await api.health(node))["reported"]["bootId"] == "three"
    other = await api.register("other")
    assert (await api.beat(other, bootId="one", sequence=1)).status_code == 200


async def test_of_many_at_once_the_highest_sequence_stands(api: Api) -> None:
    node = await api.register()
    answers = await asyncio.gather(
        *[api.beat(node, bootId="b", sequence=number, queueDepth=number) for number in [*range(20, 0, -1), *range(21)]]
    )
    assert {answer.status_code for answer in answers} == {200}
    assert (await api.health(node))["queueDepth"] == 20


async def test_a_retry_that_reaches_another_replica_is_a_repetition_there(api: Api, settings: Settings) -> None:
    async with open_api(api.replica.database.url, settings) as other:
        for number in range(5):
            node = await api.register(f"node {number}")
            first = await api.beat(node, bootId="b", sequence=1)
            again = await other.beat(node, bootId="b", sequence=1)
            assert again.status_code == 200, again.text
            assert again.json()["receivedAt"] == first.json()["receivedAt"]


async def test_a_heartbeat_reports_models_anew_each_time(api: Api) -> None:
    node = await api.register()
    for models in (["a", "b"], ["c"], []):
        await api.beat(node, availableModels=models)
        assert (await api.health(node))["availableModels"] == models


async def test_a_heartbeat_never_lifts_an_operators_drain(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    await api.http.post(f"/compute/drain/{node}")
    for status in ("healthy", "draining", "healthy", "unhealthy"):
        answer = (await api.beat(node, status=status)).json()
        assert (answer["status"], answer["drain"]) == ("draining", True)
        assert (await api.health(node))["status"] == "draining"


async def test_a_node_that_says_it_drains_does_until_it_says_otherwise(api: Api) -> None:
    node = await api.register()
    for status in ("healthy", "draining", "healthy", "draining", "unhealthy"):
        answer = (await api.beat(node, status=status)).json()
        assert (answer["status"], answer["drain"]) == (status, False)
        assert (await api.health(node))["status"] == status


async def test_heartbeats_are_a_post(api: Api) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = await api.http.request(method, "/compute/heartbeat")
        assert (answer.status_code, error_code(answer)) == (405, "METHOD_NOT_ALLOWED")
        assert answer.headers["allow"] == "POST"


async def test_a_burst_of_six_is_taken_and_the_seventh_is_told_when_to_come_again(
    database_url: str, entrance: Entrance
) -> None:
    slow = Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0.01)
    async with open_api(database_url, slow) as opened:
        api = entrance(opened)
        node, other = await api.register("a"), await api.register("b")
        assert [(await api.beat(node)).status_code for _ in range(6)] == [200] * 6
        before = await api.health(node)
        refused = await api.beat(node, load=0.9)
        assert (refused.status_code, error_code(refused)) == (429, "RATE_LIMITED")
        assert 1 <= int(refused.headers["retry-after"]) <= 100
        assert (await api.health(node))["load"] == before["load"]
        assert (await api.beat(other)).status_code == 200


async def test_both_entrances_answer_alike(api: Api) -> None:
    """To the last header, and so are they counted; the fast path refuses by itself what needs no database.

    A stranger's heartbeat needs it, as one of a missing node does: time must not tell them apart.
    """
    node, other, ended = [await api.register(name) for name in "abc"]
    await api.http.post(f"/compute/deregister/{ended}")
    for boot in ("former", "new"):
        await api.beat(node, bootId=boot, sequence=3)
    bound = (await api.new_key("admin", ["compute"], passportId=other)).key
    reader = (await api.new_key("admin", ["inference:run"])).key
    stranger = (await api.new_key("stranger", ["compute"])).key
    fast, lane = FastPath(api.app), api.app.heartbeats
    for key, changes, status in (
        (api.key, {"bootId": "new", "sequence": 3}, 200),
        (api.key, {"bootId": "former", "sequence": 9}, 422),
        (api.key, {}, 200),
        (api.key, {"load": 7, "status": "dead"}, 422),
        (api.key, {"passportId": ended}, 410),
        (api.key, {"passportId": "nobody"}, 404),
        (stranger, {}, 404),
        (bound, {}, 403),
        (reader, {}, 403),
        ("lk_live_wrong", {}, 401),
        (None, {}, 401),
    ):
        told = []
        for each in (Api(api.app, key), Api(api.app, key, fast)):
            outcomes = lane.outcomes.copy()
            answer = await each.beat(node, **changes)
            of_the_moment = {"content-length"} if status == 200 else set()
            headers = {name: value for name, value in answer.headers.items() if name not in of_the_moment}
            body = answer.json()
            for name in ("receivedAt", "freshUntil", "unhealthyAt", "nextHeartbeatInSeconds"):
                body.pop(name, None)
            told.append((answer.status_code, headers, body, lane.outcomes - outcomes))
        assert told[0] == told[1]
        assert told[0][0] == status
    assert (fast.responses, fast.tasks) == (7, 4)


async def test_a_rate_of_0_switches_the_limit_off(api: Api) -> None:
    node = await api.register()
    assert {(await api.beat(node)).status_code for _ in range(30)} == {200}
