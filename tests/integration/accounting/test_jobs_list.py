"""GET /compute/jobs, statistics of jobs in a node's health, and jobs whose replica died."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.accounting.job_counts import JobFilter
from lucid_compute.accounting.job_search import LEAST_CACHED, MAX_CACHED, STATISTICS_TIMEOUT_SECONDS, JobSearch
from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.ledger import MARK_LOST, JobLedger, LostJobs
from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.domain.node_state import JobStatistics
from lucid_compute.server.replica import Replica
from lucid_compute.server.settings import Settings
from lucid_compute.wire import SortBy, SortOrder
from tests.api import Api, error_code, open_api
from tests.ledger import all_written, ended, expect_sums, new_job
from tests.lucid_serve import eventually
from tests.other_replicas import add_lease, run_sql

NOW = datetime.now(UTC).replace(microsecond=123_000)
FIELDS = [
    "id",
    "attempt",
    "passportId",
    "owner",
    "modelId",
    "model",
    "outcome",
    "reason",
    "status",
    "endpoint",
    "stream",
    "tokensIn",
    "tokensOut",
    "tokensCounted",
    "priceUsd",
    "firstByteMs",
    "latencyMs",
    "startedAt",
    "createdAt",
    "consumer",
    "keyId",
]


async def write(api: Api, *jobs: Job) -> None:
    """Have the jobs written: those that run as such."""
    for job in jobs:
        if job.outcome is Outcome.RUNNING:
            api.replica.jobs.begin(job)
        else:
            api.replica.jobs.finish(job)
    await all_written(api.replica.jobs)


async def listed(api: Api, **query: Any) -> dict[str, Any]:
    """One page of the list."""
    answer = await api.http.get("/compute/jobs", params=query)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def ids(api: Api, **query: Any) -> list[str]:
    """The ids of a page whose total is right."""
    page = await listed(api, perPage=100, **query)
    assert page["pagination"]["total"] == len(page["jobs"])
    return [job["id"] for job in page["jobs"]]


def done(number: int, *, outcome: Outcome = Outcome.COMPLETED, seconds_ago: float = 0.0, **changes: Any) -> Job:
    """The job of that number, so many seconds old."""
    job_id = f"00000000-0000-7000-8000-{number:012}"
    job = new_job(id=job_id, started_at=NOW - timedelta(seconds=seconds_ago), **changes)
    return job if outcome is Outcome.RUNNING else ended(job, outcome)


async def test_a_job_is_shown_with_every_field(api: Api) -> None:
    node, model_id = await api.register(), str(uuid4())
    job = ended(new_job(node_id=node, node_owner="admin", model_id=model_id, started_at=NOW, is_stream=True))
    job.price_usd, job.are_tokens_counted = Decimal("2E-7"), True
    await write(api, job)
    (shown,) = (await listed(api))["jobs"]
    assert sorted(shown) == sorted(FIELDS)
    started_at = NOW.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert shown == {
        "id": job.id,
        "attempt": 1,
        "passportId": node,
        "owner": "admin",
        "modelId": model_id,
        "model": "org/model",
        "outcome": "completed",
        "reason": None,
        "status": 200,
        "endpoint": "chat/completions",
        "stream": True,
        "tokensIn": 100,
        "tokensOut": 20,
        "tokensCounted": True,
        "priceUsd": "0.0000002",
        "firstByteMs": 12.5,
        "latencyMs": 250.25,
        "startedAt": started_at,
        "createdAt": started_at,
        "consumer": "customer",
        "keyId": "Abc123Abc123",
    }


async def test_what_is_not_known_of_a_running_job_is_null(api: Api) -> None:
    await write(api, done(1, outcome=Outcome.RUNNING))
    (shown,) = (await listed(api))["jobs"]
    unknown = {"reason", "status", "tokensIn", "tokensOut", "priceUsd", "firstByteMs", "latencyMs"}
    assert {name for name in FIELDS if shown[name] is None} == unknown
    assert shown["outcome"] == "running"


async def test_an_owner_sees_the_jobs_of_its_own_nodes_and_never_who_asked(api: Api) -> None:
    acme = await api.new_key("acme", ["passports:read"])
    rival = await api.new_key("rival", ["compute"])
    await write(
        api,
        done(1, node_owner="acme", consumer="rival"),
        done(2, node_owner="rival", consumer="acme"),
        done(3, node_id=None, node_owner=None, consumer="acme"),
    )
    assert [job[-1] for job in await ids(acme)] == ["1"]
    assert [job[-1] for job in await ids(rival)] == ["2"]
    assert [job[-1] for job in await ids(api)] == ["1", "2", "3"]
    assert [job[-1] for job in await ids(api, owner="rival")] == ["2"]
    assert [job[-1] for job in await ids(acme, owner="acme")] == ["1"]
    for page in (await listed(acme), await listed(rival)):
        assert {(job["consumer"], job["keyId"]) for job in page["jobs"]} == {(None, None)}
    refused = await acme.http.get("/compute/jobs?owner=rival")
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_another_owners_node_gives_the_same_response_as_a_missing_one(api: Api) -> None:
    acme = await api.new_key("acme", ["compute"])
    own, foreign = await acme.register("own"), await api.register("foreign")
    jobs = (done(1, node_id=own, node_owner="acme"), done(2, node_id=foreign, node_owner="admin"))
    await write(api, *jobs, done(3, node_id=own, node_owner="acme", attempt=2))
    assert [job[-1] for job in await ids(acme, passportId=own)] == ["1", "3"]
    assert [job[-1] for job in await ids(api, passportId=foreign)] == ["2"]
    answers = [await acme.http.get(f"/compute/jobs?passportId={node}") for node in (foreign, str(uuid4()), "nonsense")]
    for answer in answers:
        assert (answer.status_code, error_code(answer)) == (404, "NODE_NOT_FOUND")
    await acme.http.post(f"/compute/deregister/{own}")
    assert len(await ids(acme, passportId=own)) == 2


async def test_a_consumer_sees_its_own_requests_and_not_whose_node_served_them(api: Api) -> None:
    """On anybody's nodes, counted exactly, with the filters that providers have."""
    consumer = await api.new_key("carl", ["inference:run"])
    both = await api.new_key("carl", ["inference:run", "passports:read"])
    await write(
        api,
        done(1, node_owner="acme", consumer="carl", seconds_ago=2 * 86_400),
        done(2, node_owner="carl", consumer="rival"),
        done(3, node_id=None, node_owner=None, consumer="carl"),
        done(4, node_owner="acme", consumer="carl", outcome=Outcome.FAILED, attempt=2, seconds_ago=90_000),
        done(5, node_owner="acme", consumer="carl", outcome=Outcome.RUNNING),
        done(6, node_owner="carl", consumer="carl", model_id="00000000-0000-4000-8000-00000000abcd"),
    )

    async def numbers(caller: Api, **query: Any) -> str:
        return "".join(sorted(job[-1] for job in await ids(caller, **query)))

    assert await numbers(consumer) == "13456"
    assert await numbers(both) == "26"
    assert await numbers(both, consumer="carl") == await numbers(api, consumer="carl") == "13456"
    assert await numbers(both, consumer="carl", owner="carl") == "6"
    assert await numbers(api, consumer="carl", owner="acme") == "145"
    assert await numbers(consumer, outcome="failed") == "4"
    assert await numbers(consumer, outcome="running") == "5"
    assert await numbers(consumer, model="00000000-0000-4000-8000-00000000abcd") == ""
    assert await numbers(consumer, since=(NOW - timedelta(seconds=90_001)).isoformat()) == "3456"
    assert await numbers(consumer, until=(NOW - timedelta(seconds=80_000)).isoformat()) == "14"
    shown = {job["id"][-1]: job for job in (await listed(consumer))["jobs"]}
    assert {number: job["owner"] for number, job in shown.items()} == {**dict.fromkeys("1345"), "6": "carl"}
    assert {(job["consumer"], job["keyId"]) for job in shown.values()} == {("carl", "Abc123Abc123")}
    assert await ids(consumer, passportId=shown["1"]["passportId"]) == [shown["1"]["id"]]
    for query in ("consumer=rival", "passportId=nonsense"):
        assert (await consumer.http.get(f"/compute/jobs?{query}")).status_code in {403, 404}


async def test_each_scope_may_read_jobs_or_not_as_the_contract_says(api: Api) -> None:
    for scope in ("passports:read", "compute", "admin"):
        assert (await (await api.new_key("acme", [scope])).http.get("/compute/jobs")).status_code == 200
    consumer = await api.new_key("acme", ["inference:run"])  # sees its own requests
    assert (await consumer.http.get("/compute/jobs")).status_code == 200
    assert (await consumer.http.get("/compute/jobs?owner=acme")).status_code == 403
    assert (await (await api.new_key("acme", ["passports:write"])).http.get("/compute/jobs")).status_code == 403
    assert (await (await api.new_key("acme", ["compute"])).http.get("/compute/jobs?consumer=acme")).status_code == 403
    assert (await api.with_key(None).http.get("/compute/jobs")).status_code == 401


async def test_jobs_are_found_by_model_outcome_and_time(api: Api) -> None:
    former_id = await api.add_model("org/named")
    assert (await api.http.delete(f"/passports/{former_id}")).status_code == 204
    model_id = await api.add_model("org/named", aliases=["alias"])
    await write(
        api,
        done(1, model_id=model_id, model_name="org/named", seconds_ago=30),
        done(2, outcome=Outcome.FAILED, seconds_ago=20),
        done(3, outcome=Outcome.RUNNING, seconds_ago=10),
        done(4, model_id=former_id, model_name="org/named", seconds_ago=5),
        done(5, model_id=model_id, model_name="its former name", outcome=Outcome.REJECTED),
    )

    async def numbers(**query: Any) -> str:
        return "".join(job[-1] for job in await ids(api, **query))

    assert await numbers() == "54321"
    assert await numbers(model=model_id) == "51"
    assert await numbers(model=former_id) == "4"
    assert await numbers(model="org/named") == "541"
    assert await numbers(model="alias") == "51"
    assert await numbers(model="none") == ""
    assert await numbers(outcome="failed") == "2"
    assert await numbers(outcome="running") == "3"
    assert await numbers(outcome="lost") == ""
    at = {seconds: (NOW - timedelta(seconds=seconds)).isoformat() for seconds in (30, 20, 10)}
    assert await numbers(since=at[20]) == "5432"
    assert await numbers(until=at[20]) == "1"
    assert await numbers(since=at[20], until=at[10]) == "2"
    assert await numbers(since=at[20], outcome="completed", model="org/named") == "4"
    assert await numbers(since=at[10], until=at[30]) == ""
    for query in ({"outcome": "asleep"}, {"since": "yesterday"}, {"until": "1"}, {"perPage": "101"}, {"sortBy": "id"}):
        assert (await api.http.get("/compute/jobs", params=query)).status_code == 422


async def test_jobs_are_ordered_and_paged_as_every_list_is(api: Api) -> None:
    names = ["b", "B", "a", "ä", "_", "Z"]
    same_instant = [done(number, model_name=name, seconds_ago=3) for number, name in enumerate(names)]
    retried = [done(9, attempt=attempt, seconds_ago=9, model_name="m") for attempt in (2, 1, 3)]
    await write(api, *same_instant, *retried)
    whole = (await listed(api))["jobs"]
    assert [(job["id"][-1], job["attempt"]) for job in whole] == [
        *((str(n), 1) for n in range(6)),
        *(("9", n) for n in (1, 2, 3)),
    ]
    for sort_by, field in (("createdAt", "startedAt"), ("updatedAt", "startedAt"), ("name", "model")):
        for order in ("asc", "desc"):
            asked = {"sortBy": sort_by, "sortOrder": order}
            in_order = (await listed(api, **asked))["jobs"]
            values = [job[field] for job in in_order]
            assert values == sorted(values, reverse=order == "desc")
            for each in (1, 2, 5):  # the second half is read from the end
                pages = [(await listed(api, page=page, perPage=each, **asked))["jobs"] for page in range(1, 10)]
                assert [job for page in pages for job in page] == in_order
    paged = []
    for page in (1, 2, 3, 4):
        found = await listed(api, page=page, perPage=4)
        assert found["pagination"] == {"total": 9, "page": page, "perPage": 4, "totalPages": 3}
        paged += found["jobs"]
    assert paged == whole
    assert (await listed(api, page=1_000_000_000, perPage=100))["jobs"] == []


async def test_totals_from_the_sums_are_those_of_the_rows(api: Api) -> None:
    """For every scope and outcome, with jobs of each outcome on nodes of two owners and on none."""
    nodes = {str(uuid4()): owner for owner in ("acme", "acme", "rival")}
    places: list[tuple[str | None, str | None]] = [*nodes.items(), (None, None)]
    number = 0
    for (node, owner), outcome in product(places, Outcome):
        for _ in range(1 + number % 3):
            number += 1
            job = done(number, outcome=outcome, node_id=node, node_owner=owner)
            await write(api, job)
    for owner, looked_for, outcome in product(("acme", "rival", "none", None), (*nodes, None), (*Outcome, None)):
        _, total = await page_of(api, JobFilter(owner=owner, node_id=looked_for, outcome=outcome))
        rows = await run_sql(
            api,
            "SELECT count(*) FROM jobs WHERE ($1::text IS NULL OR node_owner = $1) "
            "AND ($2::uuid IS NULL OR node_id = $2) AND ($3::text IS NULL OR outcome = $3)",
            owner,
            looked_for,
            outcome,
        )
        assert total == rows[0][0], (owner, looked_for, outcome)
    await expect_sums(api.replica.database.url)


async def page_of(api: Api, wanted: JobFilter) -> tuple[list[Any], int]:
    """Return the first five jobs of a filter, and the number of all of them."""
    return await api.replica.job_search.list_page(
        wanted, sort_by=SortBy.CREATED_AT, sort_order=SortOrder.DESCENDING, offset=0, limit=5, viewer="acme"
    )


async def figures(api: Api, node: str) -> tuple[int | None, float | None, float | None]:
    """What the node's health says of its jobs; the list and a resume say the same."""
    health = await api.health(node)
    (in_list,) = [found for found in (await api.http.get("/compute")).json()["nodes"] if found["id"] == node]
    resumed = (await api.http.post(f"/compute/resume/{node}")).json()
    names = ("jobsCompleted", "avgLatencyMs", "errorRate")
    for other in (in_list["health"], resumed):
        assert [other[name] for name in names] == [health[name] for name in names]
    return health["jobsCompleted"], health["avgLatencyMs"], health["errorRate"]


async def test_health_counts_what_was_routed_to_the_node(api: Api) -> None:
    """Completed jobs of its life; latency and errors of the last hour; rejected and cancelled ones are nobody's."""
    node, other = await api.register("node"), await api.register("other")
    assert await figures(api, node) == (0, None, None)
    await write(api, done(1, node_id=other), done(2, node_id=None, node_owner=None))
    assert await figures(api, node) == (0, None, None)
    await write(api, done(3, node_id=node, outcome=Outcome.REJECTED), done(4, node_id=node, outcome=Outcome.CANCELLED))
    assert await figures(api, node) == (0, None, None)
    await write(api, done(5, node_id=node, outcome=Outcome.FAILED))
    assert await figures(api, node) == (0, None, 1.0)
    jobs = [done(number, node_id=node, seconds_ago=60 * number) for number in (6, 7)]
    jobs[0].latency_ms, jobs[1].latency_ms = 100.0, 201.0
    await write(api, *jobs, done(8, node_id=node, outcome=Outcome.RUNNING))
    completed, latency_ms, error_rate = await figures(api, node)
    assert (completed, latency_ms) == (2, 150.5)
    assert error_rate == pytest.approx(1 / 3)


async def test_what_is_older_than_an_hour_counts_for_the_life_alone(api: Api) -> None:
    node = await api.register()
    await write(api, done(1, node_id=node, seconds_ago=3700), done(2, node_id=node, seconds_ago=10**6))
    assert await figures(api, node) == (2, None, None)
    await write(api, done(3, node_id=node, seconds_ago=1800))

    async def are_all_counted() -> bool:
        return await figures(api, node) == (3, 250.25, 0.0)

    await eventually(are_all_counted, 60.0)


async def test_health_comes_from_memory_while_the_database_is_unavailable(api: Api) -> None:
    """With what was last known of a node, or with null, never with 0."""
    node, never_asked = await api.register("node"), await api.register("other")
    await write(api, done(1, node_id=node))
    assert (await api.health(node))["jobsCompleted"] == 1
    search = api.replica.job_search
    there, search._database = search._database, Database("postgresql://nobody@127.0.0.1:1/none")
    assert await figures(api, node) == (1, 250.25, 0.0)
    assert await figures(api, never_asked) == (None, None, None)
    search._database = there
    search._query_again_at = 0.0
    assert await figures(api, never_asked) == (0, None, None)


async def test_a_database_that_hangs_delays_health_once(api: Api) -> None:
    """For a second; the next requests get their response at once."""
    node = await api.register()
    locker = await connect(api.replica.database.url)
    transaction = locker.transaction()
    await transaction.start()
    await locker.execute("LOCK job_totals")
    clock = asyncio.get_running_loop().time
    seconds = []
    for _ in range(3):
        began = clock()
        assert (await api.health(node))["jobsCompleted"] is None
        seconds.append(clock() - began)
    await transaction.rollback()
    await locker.close()
    assert min(seconds[0], STATISTICS_TIMEOUT_SECONDS) == STATISTICS_TIMEOUT_SECONDS
    assert max(seconds[1:]) < STATISTICS_TIMEOUT_SECONDS


def test_what_is_remembered_of_nodes_is_bounded() -> None:
    search = JobSearch(Database("postgresql://nobody@127.0.0.1:1/none"))
    for start in range(0, 2 * MAX_CACHED, 1000):
        search._cache({str(number): JobStatistics(number, None, None) for number in range(start, start + 1000)})
    assert len(search._cached) == MAX_CACHED
    assert str(2 * MAX_CACHED - 1) in search._cached


def test_nodes_that_have_gone_are_not_remembered() -> None:
    gone = JobSearch(Database("postgresql://nobody@127.0.0.1:1/none"), is_known=lambda node_id: node_id == "here")
    for number in range(3 * LEAST_CACHED):
        gone._cache({name: JobStatistics(number, None, None) for name in ("here", str(number))})
    assert len(gone._cached) <= LEAST_CACHED + 2
    assert gone._cached["here"].jobs_completed == 3 * LEAST_CACHED - 1


async def outcome_of(api: Api, job: Job) -> str:
    """What the ledger says of the job."""
    ((outcome,),) = await run_sql(api, "SELECT outcome FROM jobs WHERE id = $1", job.id)
    return str(outcome)


async def running_on(api: Api, replica_id: str, *, seconds_ago: float = 100.0) -> Job:
    """A job that another replica said it runs, so many seconds ago."""
    job = new_job(started_at=datetime.now(UTC) - timedelta(seconds=seconds_ago))
    await write(api, job)
    await run_sql(api, "UPDATE jobs SET replica_id = $1 WHERE id = $2", replica_id, job.id)
    return job


async def silence(api: Api, replica_id: str, seconds: float) -> None:
    """Make the replica silent for so long."""
    statement = "UPDATE replicas SET seen_at = clock_timestamp() - make_interval(secs => $2) WHERE id = $1"
    await run_sql(api, statement, replica_id, seconds)


async def mark_lost(api: Api) -> None:
    """Let the sweep close what is lost; an outage that this busy machine itself recorded does not count."""
    await run_sql(api, "DELETE FROM outages")
    await LostJobs(api.replica.database).refresh()


async def test_the_jobs_of_a_replica_that_died_are_lost(api: Api) -> None:
    """A minute after it was last seen, or at once when it is unknown; jobs of a live replica go on."""
    alive, dead, forgotten = await add_lease(api), await add_lease(api), str(uuid4())
    jobs = {replica: await running_on(api, replica) for replica in (alive, dead, forgotten)}
    own, young = new_job(started_at=datetime.now(UTC) - timedelta(hours=1)), await running_on(api, dead, seconds_ago=40)
    await write(api, own)
    await silence(api, alive, 40)
    await silence(api, dead, 40)
    await mark_lost(api)
    assert await outcome_of(api, jobs[dead]) == "running"
    await silence(api, dead, 61)
    await mark_lost(api)
    assert [await outcome_of(api, job) for job in (jobs[alive], own, young)] == ["running"] * 3
    assert [await outcome_of(api, jobs[replica]) for replica in (dead, forgotten)] == ["lost", "lost"]
    await expect_sums(api.replica.database.url)


async def test_no_job_is_lost_for_an_outage_of_ours(api: Api) -> None:
    """For a minute after it, until then a replica may only not be back yet; and never while nobody can write."""
    dead = await add_lease(api)
    job = await running_on(api, dead)
    await silence(api, dead, 600)
    connection = await connect(api.replica.database.url)
    outage = "INSERT INTO outages (started_at, ended_at) VALUES (now() - interval '1 hour', now() - interval '50 s')"
    for hindrance in (outage, "UPDATE replicas SET seen_at = least(seen_at, now() - interval '5 seconds')", None):
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("DELETE FROM outages")
        if hindrance:
            await connection.execute(hindrance)
        await connection.execute(MARK_LOST)
        expected = "running" if hindrance else "lost"
        assert await connection.fetchval("SELECT outcome FROM jobs WHERE id = $1", job.id) == expected, hindrance
        await transaction.rollback()
    await connection.close()


async def test_the_true_outcome_of_a_lost_job_wins(api: Api) -> None:
    """A replica that was only silent comes back and finishes it; it counts, once."""
    dead = await add_lease(api)
    node = await api.register()
    job = new_job(node_id=node, started_at=datetime.now(UTC) - timedelta(seconds=100))
    await write(api, job)
    await run_sql(api, "UPDATE jobs SET replica_id = $1", dead)
    await silence(api, dead, 100)
    await mark_lost(api)
    assert await ids(api, outcome="lost") == [job.id]
    await write(api, ended(job))
    assert await ids(api, outcome="completed") == [job.id]
    assert await ids(api, outcome="lost") == []
    await expect_sums(api.replica.database.url)
    await write(api, ended(job, Outcome.FAILED))
    assert (await api.health(node))["jobsCompleted"] == 1
    await expect_sums(api.replica.database.url)


async def test_queued_jobs_are_written_when_the_service_stops(database_url: str, settings: Settings) -> None:
    def with_time_to_flush(replica: Replica) -> Replica:
        return replace(replica, jobs=JobLedger(database_url, replica_id=str(uuid4()), flush_seconds=60.0))

    async with open_api(database_url, settings, with_time_to_flush) as api:
        for number in range(2000):
            api.replica.jobs.finish(done(number))
        ledger = api.replica.jobs
    assert ledger.waiting == 0
    async with open_api(database_url, settings) as api:
        assert (await listed(api))["pagination"]["total"] == 2000
