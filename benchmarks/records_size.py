"""The claim: the records of 10,000 busy nodes for a month fit in a database that a small machine runs.

On an embedded Postgres (fsync on): an hour of a fleet whose every node serves in every minute and tells of its GPUs is
generated, moved on minute by minute as the service does it, and added up. What a record takes is measured, and what a
month takes is reckoned from it by the settings' defaults; so are the keeper's times, and what a question costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from statistics import median
from typing import Any
from uuid import uuid4

import asyncpg
import uvloop

from benchmarks.servers import data_folder, postgres_of
from lucid_compute.accounting.gauges import GaugeRecorder
from lucid_compute.accounting.rollup_columns import GAUGES
from lucid_compute.accounting.rollup_reader import RollupQuery, RollupReader
from lucid_compute.accounting.rollups import Retention, RollupKeeper
from lucid_compute.accounting.timeline import STEPS, Timeline
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.server.settings import Settings

NODES = int(os.environ.get("BENCH_NODES", "2000"))
FLEET = 10_000
OWNERS = max(NODES // 50, 1)
JOBS_A_MINUTE = 10
MINUTES = 60
HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
GIB = 1024**3

_PASSPORTS = """
    INSERT INTO passports (id, type, owner, name)
    SELECT gen_random_uuid(), 'compute', 'owner-' || g % $2::int, 'node-' || g FROM generate_series(1, $1::int) g
"""
# Durations lie over one and a half decades, as those of short and long answers do; every tenth node fails a job.
_JOBS = """
    INSERT INTO job_open
    SELECT p.id, $1, md5(p.owner)::uuid, p.owner, $2, (random() < 0.1)::int, 0, 0, $2, 8000000, 2000000, 10000, 3000,
        0.0123456789, d.spread, CASE WHEN random() < 0.1 THEN '{"failed:http_503": 1}'::jsonb END
    FROM passports p, LATERAL (
        SELECT array_agg(place << 22 | n) AS spread FROM (
            SELECT kind * 256 + 80 + floor(random() * 36)::int AS place, count(*)::int AS n
            FROM generate_series(1, $2::int) j, generate_series(0, 1) kind WHERE p.id IS NOT NULL GROUP BY 1
        ) s
    ) d
"""
_SAMPLES = f"""
    INSERT INTO gauge_open SELECT p.id, $1, p.owner, 7, {", ".join(["3.5"] * len(GAUGES))},
        {", ".join(["0.9"] * len(GAUGES))}, {", ".join(["7"] * len(GAUGES))} FROM passports p
"""
_SIZES = """
    SELECT $1 || '_' || t AS name, pg_total_relation_size(($1 || '_' || t)::regclass) AS bytes
    FROM unnest(ARRAY['minutes', 'hours', 'days']) t
"""


def main() -> None:
    """Measure, and print it."""
    _time_notes()
    with data_folder() as folder, postgres_of(folder) as url:
        uvloop.run(_measure(url))


def _time_notes() -> None:
    """Print what the sampling adds to a heartbeat."""
    gauges = GaugeRecorder("", Fleet(), replica_id=str(uuid4()))
    gpus = [{"index": n, "utilization": 0.5, "memoryUsedMb": 1.0, "memoryTotalMb": 2.0} for n in range(8)]
    at = datetime.now(UTC)
    for name, more in (("without GPUs", {}), ("with eight GPUs", {"gpus": gpus})):
        fields = {"status": "healthy", "load": 0.5, "availableModels": [], "queueDepth": 1, **more}
        beats = [Heartbeat.model_validate({"passportId": str(uuid4()), **fields}) for _ in range(1000)]
        rounds = [_time_round(gauges, beats, at) for _ in range(50)]
        print(f"{f'sampling a heartbeat {name}':<52}{median(rounds) * 1e6 / len(beats):>10.2f} us")


def _time_round(gauges: GaugeRecorder, beats: list[Heartbeat], at: datetime) -> float:
    began = time.perf_counter()
    for beat in beats:
        gauges.record(beat, at)
    return time.perf_counter() - began


async def _measure(url: str) -> None:
    await schema.upgrade(url)
    connection = await connect(url, timeout_seconds=60)
    await connection.execute(_PASSPORTS, NODES, OWNERS)
    long_ago = HOUR.replace(hour=0) - timedelta(days=2)
    await connection.execute("UPDATE record_marks SET began_at = $1, hours_until = $1, days_until = $1", long_ago)
    keeper = RollupKeeper(url, Retention(48, 90, 1100))
    print(f"{NODES:,} nodes of {OWNERS} owners, {JOBS_A_MINUTE} jobs a minute on each, {MINUTES} minutes")
    moves = []
    for minute in range(MINUTES):
        at = HOUR + timedelta(minutes=minute)
        await connection.execute(_JOBS, at, JOBS_A_MINUTE, timeout=120)
        await connection.execute(_SAMPLES, at, timeout=120)
        moves.append(await _seconds(partial(keeper.keep, cleans=False, now=at + timedelta(minutes=2))))
    print(f"{'moving a minute of the fleet on':<52}{median(moves):>10.2f} s")
    next_day = HOUR.replace(hour=0) + timedelta(days=1)
    for name, until in (("an hour", HOUR + timedelta(hours=1, minutes=3)), ("a day", next_day + timedelta(minutes=3))):
        took = await _seconds(partial(keeper.keep, cleans=False, now=until))
        print(f"{f'adding {name} up':<52}{took:>10.2f} s")
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await _print_sizes(connection)
    node_id = await connection.fetchval("SELECT id::text FROM passports LIMIT 1")
    await connection.close()
    await _ask(url, node_id)


async def _print_sizes(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    settings = Settings()
    kept = {
        "minutes": settings.records_minutes_kept_hours * 60,
        "hours": 30 * 24,
        "days": 30,
    }
    whole = 0.0
    for kind in ("job", "gauge"):
        for name, size in await connection.fetch(_SIZES, kind):
            records = await connection.fetchval(f"SELECT count(*) FROM {name}")
            tier = name.split("_")[1]
            buckets = MINUTES if tier == "minutes" else 1
            total = size / buckets / NODES * FLEET * kept[tier]
            whole += total
            print(f"{name:<20}{size / records:>8.0f} bytes a record{total / GIB:>12.2f} GiB of a month")
    print(f"{f'{FLEET:,} nodes for a month, all tables and indexes':<52}{whole / GIB:>10.1f} GiB")


async def _ask(url: str, node_id: str) -> None:
    database = Database(url, timeout_seconds=60)
    reader = RollupReader(database, Retention(48, 90, 1100))
    now = datetime.now(UTC)
    for step, length in (("1m", timedelta(hours=3)), ("1m", timedelta(hours=24)), ("1h", timedelta(days=7))):
        for name, wanted in (("a node", RollupQuery(node_id=node_id)), ("all", RollupQuery())):
            timeline = Timeline.around(now - length, now, STEPS[step])
            ask = partial(reader.measure, wanted, timeline, now=now, known_since=None)
            took = median([await _seconds(ask) for _ in range(5)])
            print(f"{f'{name}, {length} by {step}':<52}{took * 1000:>10.1f} ms")
    await database.close()


async def _seconds(work: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
