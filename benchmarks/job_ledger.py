"""The claim behind the job ledger: a record of every request costs the router a few per cent of its core.

On an embedded Postgres (fsync on): what `finish` takes, how many rows a second the writer sustains, what it takes of
this process at a steady rate and for how long it ever holds the event loop; and pages of a ledger of a million rows.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from statistics import median
from typing import Any
from uuid import uuid4

import uvloop

from benchmarks.servers import data_folder, postgres_of
from lucid_compute.accounting.job_counts import JobFilter
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.ledger import JobLedger
from lucid_compute.gateway.request import new_job_id
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import Database, connect
from lucid_compute.wire import SortBy, SortOrder

RATE = int(os.environ.get("BENCH_RATE", "12000"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
ROWS = int(os.environ.get("BENCH_ROWS", "1000000"))
TICK_SECONDS = 0.001
NODES = [str(uuid4()) for _ in range(100)]
MODELS = [(str(uuid4()), f"org/model-{number}") for number in range(20)]
_FILL = """
    INSERT INTO jobs SELECT gen_random_uuid(), 1, gen_random_uuid(), ($2::uuid[])[1 + g % 20], 'org/model-' || g % 20,
        ($1::uuid[])[1 + g % 100], 'acme', 'Abc123Abc123', 'customer', 'chat/completions', g % 2 = 0,
        now() - g * interval '80 us', CASE WHEN g % 100 = 0 THEN 'failed' ELSE 'completed' END, NULL, 200, 100, 1000,
        1000, 200, false, 0.002
    FROM generate_series(1, $3::int8) g
"""
_SUM = """
    INSERT INTO job_totals SELECT node_id, 'acme', count(*) FILTER (WHERE outcome = 'completed'),
        count(*) FILTER (WHERE outcome = 'failed'), 0, 0
    FROM jobs GROUP BY node_id
"""


def main() -> None:
    """Measure, and print it."""
    with data_folder() as folder, postgres_of(folder) as url:
        uvloop.run(_measure(url))


async def _measure(url: str) -> None:
    await schema.upgrade(url)
    _time_finish(url)
    ledger = JobLedger(url, replica_id=str(uuid4()))
    steps = Steps(ledger.run())
    task = asyncio.create_task(steps.run())
    await _sustain(ledger)
    steps.longest_seconds = 0.0
    await _keep_pace(ledger)
    print(f"{'longest that it held the event loop':<44}{steps.longest_seconds * 1000:>10.2f} ms")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await _read(url)


class Steps:
    """Runs a coroutine, and knows the longest that one of its steps held the event loop, in this thread's own time."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self.longest_seconds = 0.0

    @types.coroutine
    def run(self) -> Generator[Any, Any, None]:
        """Run it to its end."""
        send: Callable[..., Any] = self._coroutine.send
        value: Any = None
        while True:
            began = time.thread_time()
            try:
                awaited = send(value)
            except StopIteration:
                return
            finally:
                self.longest_seconds = max(self.longest_seconds, time.thread_time() - began)
            try:
                send, value = self._coroutine.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 - a cancellation among them, for the coroutine to see
                send, value = self._coroutine.throw, error


def _new_job() -> Job:
    model_id, model_name = random.choice(MODELS)
    job = Job(
        id=new_job_id(time.time_ns()),
        attempt=1,
        model_id=model_id,
        model_name=model_name,
        node_id=random.choice(NODES),
        node_owner="acme",
        key_id="Abc123Abc123",
        consumer="customer",
        endpoint="chat/completions",
        is_stream=False,
        started_at=datetime.now(UTC),
    )
    job.outcome, job.status, job.price_usd = Outcome.COMPLETED, 200, Decimal("0.002400")
    job.first_byte_ms, job.latency_ms = random.uniform(1, 300), random.uniform(300, 2000)
    job.tokens_in, job.tokens_out = 1000, 200
    return job


def _time_finish(url: str) -> None:
    rounds = []
    for _ in range(200):
        ledger, jobs = JobLedger(url, replica_id=str(uuid4())), [_new_job() for _ in range(240)]
        began = time.perf_counter()
        for job in jobs:
            ledger.finish(job)
        rounds.append((time.perf_counter() - began) / len(jobs))
    print(f"{'finish, row and all':<44}{median(rounds) * 1e6:>10.2f} µs a job")


async def _sustain(ledger: JobLedger) -> None:
    jobs = [_new_job() for _ in range(int(8 * RATE))]
    for job in jobs:
        ledger.finish(job)
    began, used = time.perf_counter(), time.process_time()
    while ledger.waiting:  # noqa: ASYNC110 - the ledger has no event for it
        await asyncio.sleep(0.01)
    took = time.perf_counter() - began
    print(f"{'rows written, with all that waited':<44}{len(jobs) / took:>10,.0f} rows/s")
    print(f"{'… of this process beside finish':<44}{(time.process_time() - used) / len(jobs) * 1e6:>10.2f} µs a job")


async def _keep_pace(ledger: JobLedger) -> None:
    """Finish jobs at a steady rate, as requests would, and the same without telling; the difference is the share."""
    used = {False: 0.0, True: 0.0}
    for is_recorded in (False, True) * 3:
        due, before = time.perf_counter(), time.process_time()
        ends_at = due + SECONDS / 3
        while due < ends_at:
            due += TICK_SECONDS
            for _ in range(RATE // 1000):
                job = _new_job()
                if is_recorded:
                    ledger.finish(job)
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        used[is_recorded] += time.process_time() - before
    share = (used[True] - used[False]) / SECONDS
    print(f"{f'share of this core at {RATE:,} jobs/s':<44}{share * 100:>10.1f} %")


async def _read(url: str) -> None:
    connection = await connect(url, timeout_seconds=60)
    await connection.execute("TRUNCATE jobs, job_open, job_minutes, job_totals")
    await connection.execute(_FILL, NODES, [model_id for model_id, _ in MODELS], ROWS, timeout=600)
    await connection.execute(_SUM, timeout=600)
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.close()
    database = Database(url, timeout_seconds=60)
    search = JobSearch(database)
    hour = datetime.now(UTC)
    print(f"a page of 20 and the exact total, of {ROWS:,} rows")
    for name, wanted in {
        "an owner's": JobFilter(owner="acme"),
        "everyone's": JobFilter(),
        "an owner's failures": JobFilter(owner="acme", outcome=Outcome.FAILED),
        "an owner's lost jobs": JobFilter(owner="acme", outcome=Outcome.LOST),
        "a node's": JobFilter(node_id=NODES[0]),
        "an owner's, up to an instant (rows counted)": JobFilter(owner="acme", until=hour),
        "an owner's, of a model (rows counted)": JobFilter(owner="acme", model_ids=[MODELS[0][0]]),
    }.items():
        await _time(name, partial(_page, search, wanted))
    await _time("the last page of an owner's", partial(_page, search, JobFilter(owner="acme"), offset=ROWS - 20))
    await _time("statistics of 100 nodes", partial(search.statistics, NODES))
    await database.close()


async def _page(search: JobSearch, wanted: JobFilter, offset: int = 0) -> object:
    return await search.list_page(
        wanted,
        sort_by=SortBy.CREATED_AT,
        sort_order=SortOrder.DESCENDING,
        offset=offset,
        limit=20,
        viewer=None,
    )


async def _time(name: str, ask: Callable[[], Awaitable[object]]) -> None:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        await ask()
        took.append(time.perf_counter() - began)
    print(f"  {name:<46}{median(took) * 1000:>6.1f} ms")


if __name__ == "__main__":
    main()
