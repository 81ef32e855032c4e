"""Metrics over time over HTTP: values by steps, and null where nothing was measured."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.postgres.database import connect
from lucid_compute.server.settings import Settings
from tests.api import Api, error_code, open_api
from tests.ledger import all_written, ended, new_job
from tests.other_replicas import run_sql

MINUTE = timedelta(minutes=1)


def minutes_ago(minutes: float) -> datetime:
    """That long ago."""
    return datetime.now(UTC) - minutes * MINUTE


async def tell(api: Api, *jobs: Job) -> None:
    """Have the ledger write the jobs."""
    for job in jobs:
        api.replica.jobs.finish(job)
    await all_written(api.replica.jobs)


async def ask(api: Api, path: str = "", **query: Any) -> dict[str, Any]:
    """Request metrics; `from_` is sent as `from`."""
    params = {name.rstrip("_"): value for name, value in query.items()}
    answer = await api.http.get(f"/compute/metrics{path}", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def age_records(api: Api, node_id: str) -> None:
    """Let records, and the node, be a day old, as if all had been there before."""
    await run_sql(api, "UPDATE record_marks SET began_at = now() - interval '1 day'")
    node = api.replica.fleet.get_node(node_id, owner=None)
    object.__setattr__(node.state.passport.record, "created_at", minutes_ago(60 * 24))


async def test_jobs_are_counted_in_their_minutes_and_in_all(api: Api) -> None:
    node = await api.register()
    await age_records(api, node)
    at = minutes_ago(10)
    jobs = [
        ended(new_job(node_id=node, node_owner="acme", started_at=at), latency_ms=latency, first_byte_ms=latency / 10)
        for latency in (100.0, 200.0, 300.0, 400.0)
    ]
    jobs += [
        ended(
            new_job(node_id=node, node_owner="acme", started_at=at), Outcome.FAILED, reason="http_503", price_usd=None
        ),
        ended(new_job(node_id=node, node_owner="acme", started_at=at), Outcome.REJECTED, reason="http_400"),
    ]
    await tell(api, *jobs)
    for _ in range(2):  # in what is open, and moved on
        found = await ask(api, f"/{node}", from_="-20m", step="1m")
        step = found["times"].index(at.replace(second=0, microsecond=0).isoformat(timespec="milliseconds")[:-6] + "Z")
        series, totals = found["series"], found["totals"]
        assert (found["passportId"], found["step"], found["stepSeconds"]) == (node, "1m", 60)
        assert len(found["times"]) == len(series["requests"])
        for name, figure in (
            ("requests", 6),
            ("completed", 4),
            ("failed", 1),
            ("rejected", 1),
            ("cancelled", 0),
            ("errorRate", 0.2),
            ("latencyAvgMs", 250.0),
            ("firstByteAvgMs", 25.0),
            ("tokensIn", 600),
            ("tokensOut", 120),
            ("revenueUsd", str(5 * Decimal("0.000123456789"))),
        ):
            assert series[name][step] == totals[name] == figure, name
        assert series["latencyP50Ms"][step] == pytest.approx(200, rel=0.05)
        assert series["latencyP99Ms"][step] == totals["latencyP99Ms"] == pytest.approx(400, rel=0.05)
        assert series["firstByteP95Ms"][step] == pytest.approx(40, rel=0.05)
        assert found["failures"]["http_503"][step] == found["failureTotals"]["http_503"] == 1
        assert series["requests"][step - 1] == 0
        assert series["revenueUsd"][step - 1] == "0"
        assert series["latencyP50Ms"][step - 1] is series["errorRate"][step - 1] is None
        listed = (await api.http.get("/compute/jobs", params={"since": found["from"], "until": found["to"]})).json()
        assert listed["pagination"]["total"] == totals["requests"]
        await api.replica.rollup_keeper.keep()
    assert not await run_sql(api, "SELECT FROM job_open")


async def test_nothing_is_known_of_before_the_node_was_there_nor_of_what_is_to_come(api: Api) -> None:
    node = await api.register()
    found = await ask(api, f"/{node}", from_="-10m", to=(datetime.now(UTC) + 5 * MINUTE).isoformat(), step="1m")
    requests = found["series"]["requests"]
    assert requests[0] is None
    assert requests[-1] is None
    assert 0 in requests
    assert set(found["series"]["load"]) == {None}


async def test_heartbeats_are_averaged_and_null_where_nothing_was_reported(api: Api) -> None:
    node = await api.register()
    await api.beat(node, load=0.2, queueDepth=4, inFlight=2)
    await api.beat(node, load=0.6, gpus=[{"index": 0, "utilization": 0.9, "memoryUsedMb": 10, "memoryTotalMb": 20}])
    await api.beat(node, load=None, queueDepth=None)
    await api.replica.gauges.flush()
    for path in (f"/{node}", ""):
        totals = (await ask(api, path, from_="-5m"))["totals"]
        assert totals["heartbeats"] == 3
        assert (totals["load"], totals["loadMax"]) == (pytest.approx(0.4), pytest.approx(0.6))
        assert (totals["queueDepth"], totals["queueDepthMax"]) == (2, 4)
        assert (totals["inFlight"], totals["reportedInFlight"]) == (0, 2)
        assert totals["gpuUtilization"] == pytest.approx(0.9)
        assert (totals["gpuMemoryUsedMb"], totals["gpuMemoryTotalMb"]) == (10, 20)


async def test_a_fleet_is_ones_own_nodes_and_an_admins_is_everything(api: Api) -> None:
    acme, globex = [await api.new_key(owner, ["compute"]) for owner in ("acme", "globex")]
    nodes = {"acme": await acme.register(), "globex": await globex.register()}
    await tell(
        api,
        *(ended(new_job(node_id=node, node_owner=owner)) for owner, node in nodes.items() for _ in range(3)),
        ended(new_job(node_id=None, node_owner=None)),
    )
    for _ in range(2):
        assert (await ask(acme))["totals"]["requests"] == 3
        assert (await ask(api))["totals"]["requests"] == 7
        assert (await ask(api, owner="globex"))["totals"]["requests"] == 3
        await api.replica.rollup_keeper.keep(now=datetime.now(UTC) + 5 * MINUTE)
    refused = await acme.http.get("/compute/metrics", params={"owner": "globex"})
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")
    for path in ("metrics", "uptime"):
        hidden = await acme.http.get(f"/compute/{path}/{nodes['globex']}")
        assert (hidden.status_code, error_code(hidden)) == (404, "NODE_NOT_FOUND")


async def test_one_models_jobs_are_found_by_its_name(api: Api) -> None:
    model = await api.add_model("org/model")
    node = await api.register()
    await tell(api, ended(new_job(node_id=node, model_id=model)), ended(new_job(node_id=node)))
    await api.replica.rollup_keeper.keep(now=datetime.now(UTC) + 5 * MINUTE)
    for path in (f"/{node}", ""):
        assert (await ask(api, path, model="org/model"))["totals"]["requests"] == 1
        for unknown in ("unknown", "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"):
            assert (await ask(api, path, model=unknown))["totals"]["requests"] == 0
        assert (await ask(api, path))["totals"]["requests"] == 2


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"from": "yesterday"}, "query.from"),
        ({"to": "-1y"}, "query.to"),
        ({"from": "-999999w"}, "query.from"),
        ({"from": "-7d", "step": "1m"}, "query.step"),
        ({"from": "0001-01-01T00:00:00Z"}, "query.from"),
        ({"from": "1980-01-01T00:00:00Z"}, "query.step"),
        ({"from": "9999-12-31T23:59:58Z", "to": "9999-12-31T23:59:59Z", "step": "1d"}, "query.to"),
        ({"from": "-1h", "to": "-2h"}, "query.to"),
        ({"from": "9000-01-01T00:00:00Z"}, "query.to"),
        ({"from": "NaN"}, "query.from"),
        ({"from": "2026-01-01T00:00:00"}, "query.from"),
        ({"from": "2026-02-30T00:00:00Z"}, "query.from"),
        ({"series": "requests,nonsense"}, "query.series"),
        ({"step": "2m"}, "query.step"),
    ],
)
async def test_an_invalid_query_is_refused_with_what_to_send(api: Api, query: dict[str, str], field: str) -> None:
    answer = await api.http.get("/compute/metrics", params=query)
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST")
    assert answer.json()["error"]["details"]["fields"][0]["path"] == field


@pytest.mark.parametrize("year", ["1970", "9999"])
async def test_a_span_without_data_gives_nulls(api: Api, year: str) -> None:
    await api.register()
    found = await ask(api, from_=f"{year}-01-01T00:00:00Z", to=f"{year}-01-01T00:05:00Z", step="1m")
    assert len(found["times"]) == 5
    assert set(found["series"]["requests"]) == set(found["series"]["uptime"]) == {None}
    empty = await ask(api, from_="1999-01-01T00:00:00Z", to="1999-01-01T00:00:00Z")
    assert (empty["times"], empty["totals"]["requests"]) == ([], None)


async def test_series_are_chosen_by_name_and_come_as_csv(api: Api) -> None:
    node = await api.register()
    await tell(api, ended(new_job(node_id=node), Outcome.FAILED, reason='=1,"2"'))
    query = {"series": "failures,requests,latencyP99Ms", "from": "-2m"}
    found = await ask(api, f"/{node}", from_="-2m", series="failures,requests")
    assert set(found["series"]) == {"requests"}
    for headers, more in (({"Accept": "text/csv"}, {}), ({}, {"format": "csv"})):
        answer = await api.http.get(f"/compute/metrics/{node}", params={**query, **more}, headers=headers)
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        head, *lines = csv.reader(io.StringIO(answer.text))
        assert head == ["time", "requests", "latencyP99Ms", 'failures.=1,"2"']
        assert [line[0] for line in lines] == found["times"]
        assert lines[-1][1:] in (["1", "", "1"], ["0", "", "0"])
    uptime = await api.http.get("/compute/uptime", params={"format": "csv"})
    assert next(csv.reader(io.StringIO(uptime.text)))[:4] == ["passportId", "name", "days", "uptime"]


async def test_uptime_is_healthy_time_without_drains_and_outages_of_ours(api: Api) -> None:
    node = await api.register()
    hours = {"healthy": 40, "unhealthy": 30, "draining": 10}
    for state, ago in [*hours.items(), ("healthy", 8)]:
        statement = "INSERT INTO node_states VALUES ($1, now() - $2 * interval '1 hour', $3, 'acme')"
        await run_sql(api, statement, node, ago, state)
    await run_sql(
        api, "INSERT INTO outages (started_at, ended_at) VALUES (now() - interval '20 h', now() - interval '15 h')"
    )
    answer = (await api.http.get(f"/compute/uptime/{node}", params={"target": 0.5})).json()
    day, week, month = answer["windows"]
    hour = 3600
    assert (day["days"], week["days"], month["days"]) == (1, 7, 30)
    assert day["healthySeconds"] == pytest.approx(8 * hour, abs=5)
    assert day["unhealthySeconds"] == pytest.approx((14 - 5) * hour, abs=5)
    assert day["drainingSeconds"] == pytest.approx(2 * hour, abs=5)
    assert day["registryOutageSeconds"] == pytest.approx(5 * hour, abs=5)
    assert day["uptime"] == pytest.approx(8 / 17, abs=0.001)
    assert month["uptime"] == week["uptime"] == pytest.approx(18 / 33, abs=0.001)
    assert week["errorBudget"]["allowedSeconds"] == pytest.approx(33 / 2 * hour, abs=10)
    assert week["errorBudget"]["remaining"] == pytest.approx(1 - 15 / 16.5, abs=0.001)
    fleet = (await api.http.get("/compute/uptime", params={"target": 0.5})).json()
    assert fleet["windows"][1]["uptime"] == pytest.approx(week["uptime"], abs=0.001)
    assert fleet["nodes"][0]["passportId"] == node
    series = await ask(api, f"/{node}", from_="-24h", step="1h", series="uptime,nodesHealthy,registryOutageSeconds")
    assert series["outages"][0]["startedAt"] < series["outages"][0]["endedAt"]
    assert series["series"]["registryOutageSeconds"].count(3600) == 4
    assert series["totals"]["uptime"] == pytest.approx(8 / 17, abs=0.1)
    assert series["series"]["uptime"][-2] == 1


async def test_nodes_are_counted_over_the_time_of_which_their_states_are_kept(api: Api) -> None:
    """Records of minutes are kept for two days, states longer: what is cut off of the one counts for the other."""
    node = await api.register()
    await run_sql(api, "UPDATE record_marks SET began_at = now() - interval '5 days'")
    object.__setattr__(
        api.replica.fleet.get_node(node, owner=None).state.passport.record, "created_at", minutes_ago(7200)
    )
    await run_sql(api, "INSERT INTO node_states VALUES ($1, now() - interval '4 days', 'healthy', 'acme')", node)
    for path in (f"/{node}", ""):
        found = await ask(api, path, from_="-60h", to="-40h", step="1m", series="nodesHealthy,requests")
        assert set(found["series"]["nodesHealthy"]) == {1}
        assert found["totals"]["nodesHealthy"] == 1
        assert found["series"]["requests"][0] is None


async def test_a_node_without_a_heartbeat_has_no_uptime(api: Api) -> None:
    node = await api.register()
    for window in (await api.http.get(f"/compute/uptime/{node}")).json()["windows"]:
        assert window["uptime"] is None
        assert window["errorBudget"] is None


async def test_an_unavailable_database_gives_503(database_url: str, settings: Settings) -> None:
    locker = await connect(database_url)
    transaction = locker.transaction()
    await transaction.start()
    try:
        async with open_api(database_url, settings.model_copy(update={"database_timeout_seconds": 1.0})) as api:
            node = await api.register()
            await locker.execute("LOCK job_open, node_states IN ACCESS EXCLUSIVE MODE")
            for path in ("metrics", f"metrics/{node}", "uptime", f"uptime/{node}"):
                answer = await api.http.get(f"/compute/{path}")
                assert (answer.status_code, error_code(answer)) == (503, "DATABASE_UNAVAILABLE")
                assert "retry-after" in answer.headers
    finally:
        await transaction.rollback()
        await locker.close()
