"""Migrations: up and down on a filled database, and the same tables as the code says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from lucid_compute.postgres import revisions, schema
from lucid_compute.postgres.database import DatabaseNotUsable, check_usable, connect
from lucid_compute.server.preparation import prepare
from lucid_compute.server.schema_tables import metadata
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, open_api
from tests.landed import LANDED, MODEL, NODE, VERSIONS, Rows, all_rows, grow, shared, write_rows
from tests.ledger import read


def test_every_revision_that_has_landed_is_still_there() -> None:
    """In the order in which databases went through them; a new one gets rows in `tests/landed.py`."""
    assert tuple(reversed(revisions.known_revisions())) == LANDED


def test_revisions_are_read_as_alembic_reads_them() -> None:
    """Workers read the files themselves, without Alembic."""
    scripts = ScriptDirectory(str(revisions.migrations_folder()))
    assert [script.revision for script in scripts.walk_revisions()] == revisions.known_revisions()


def expect_kept(before: Rows, after: Rows) -> None:
    """Every row of `before` is there, in what the tables have in common. Minutes of the ledger became records."""
    rewritten = {"job_minutes"} if "record_marks" not in before else set()
    for table in before.keys() - rewritten:
        assert len(after[table]) == len(before[table]), table
        assert shared(after[table], before[table]) == shared(before[table], after[table]), table


async def test_no_migration_loses_a_row(empty_url: str) -> None:
    """On a database that went through every revision, with rows of each."""
    before: Rows = {}
    for revision in LANDED:
        await schema.upgrade(empty_url, revision)
        expect_kept(before, await all_rows(empty_url))
        await write_rows(empty_url, revision)
        before = await all_rows(empty_url)


@pytest.mark.parametrize("revision", VERSIONS)
async def test_rows_of_any_landed_version_live_on(empty_url: str, settings: Settings, revision: str) -> None:
    """Up to this version, where each job is billed once, down to theirs, and up again, where the service reads them."""
    await grow(empty_url, revision)
    before = await all_rows(empty_url)
    await schema.upgrade(empty_url)
    await schema.check(empty_url)
    after = await all_rows(empty_url)
    expect_kept(before, after)
    followed = [row["passport_ids"] for row in after["webhooks"] if not row["all_owners"]]
    assert followed == ([[NODE]] if "webhooks" in before else [])
    assert sum(line["gross_usd"] for line in after["payout_open"]) == sum(job["price_usd"] for job in after["jobs"])
    assert sum(line["price_usd"] for line in after["usage_days"]) == sum(job["price_usd"] for job in after["jobs"])
    await schema.downgrade(empty_url, revision)
    assert await all_rows(empty_url) == before
    await prepare(empty_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
    async with open_api(empty_url, settings) as api:
        node = (await api.http.get(f"/passports/{NODE}")).json()
        assert (node["owner"], node["name"], node["tags"]) == ("olga", "rack-1", ["eu"])
        assert (await api.http.get(f"/models/{MODEL}/availability")).status_code == 200
        jobs = (await api.http.get("/compute/jobs")).json()
        assert len(jobs["jobs"]) == len(before.get("jobs", []))


async def test_migrations_go_down_and_up_on_a_filled_database(database_url: str, settings: Settings) -> None:
    """Down to nothing and up again, the service works on it as on a new one."""
    for _ in range(2):
        async with open_api(database_url, settings) as api:
            node_id = await api.register()
            await api.add_model("m", aliases=["n"])
            assert (await api.beat(node_id, bootId="b", sequence=1)).status_code == 200
            await api.http.post(f"/compute/drain/{node_id}")
        await schema.downgrade(database_url, "base")
        assert await revisions.current_revision(database_url) is None
        await prepare(database_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
        assert await revisions.current_revision(database_url) == revisions.head_revision()


async def test_the_migrations_make_what_the_tables_say(database_url: str) -> None:
    """A table changed without a migration is noticed."""
    await schema.check(database_url)


async def test_the_migrations_set_how_tables_are_stored(database_url: str) -> None:
    """As the code says, which Alembic does not compare: how full pages are, and how often they are vacuumed."""
    rows = await read(database_url, "SELECT relname, reloptions FROM pg_class WHERE relkind = 'r'")
    stored = {name: dict(option.split("=") for option in options or []) for name, options in rows}
    for table in metadata.sorted_tables:
        assert stored[table.name] == (table.dialect_options["postgresql"]["with"] or {}), table.name


async def test_a_downgrade_keeps_the_webhooks_that_the_older_version_can_express(empty_url: str) -> None:
    """Those of one node or of all of the owner's; no other becomes one of these."""
    await grow(empty_url, LANDED[-1])
    several = "INSERT INTO webhooks (id, owner, url, secret, events, passport_ids)"
    several += " VALUES (gen_random_uuid(), $1, 'u', 's', '{}', $2)"
    for owner, passport_ids in (("one", [NODE]), ("two", [NODE, MODEL]), ("all its", None)):
        await read(empty_url, several, owner, passport_ids)
    await schema.downgrade(empty_url, "money")
    kept = await read(empty_url, "SELECT owner, passport_id::text FROM webhooks ORDER BY owner")
    assert [tuple(row) for row in kept] == [("all its", None), ("olga", NODE), ("one", NODE)]
    assert len(await read(empty_url, "SELECT FROM webhook_deliveries")) == 1


async def test_jobs_that_were_removed_before_a_downgrade_are_known_after_it(empty_url: str) -> None:
    """Or lists would name more jobs than they show, for ever."""
    await grow(empty_url, LANDED[-1])
    removals = "SELECT node_id, node_owner, completed, failed, rejected, cancelled FROM job_removals"
    before = await read(empty_url, removals)
    assert before
    await schema.downgrade(empty_url, "records")
    await schema.upgrade(empty_url)
    assert await read(empty_url, removals) == before


async def test_replicas_that_start_together_migrate_once(empty_url: str) -> None:
    """The others wait, and find it done; one admin key is made between them."""
    made = await asyncio.gather(
        *(prepare(empty_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=None) for _ in range(4))
    )
    assert sum(result.admin_key is not None for result in made) == 1


async def test_the_audit_trail_can_only_grow(database_url: str) -> None:
    """Neither an UPDATE nor a DELETE gets through, from any client."""
    connection = await connect(database_url)
    try:
        for statement in ("UPDATE audit_log SET action = 'x'", "DELETE FROM audit_log", "TRUNCATE audit_log"):
            with pytest.raises(asyncpg.RaiseError, match="append-only"):
                await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_database_of_a_newer_version_is_refused_with_what_to_do(database_url: str) -> None:
    """As after going back to an older release; a revision that is only mistyped is another matter."""
    with pytest.raises(DatabaseNotUsable, match=r"Can't locate revision identified by 'mistyped'\.$"):
        await schema.downgrade(database_url, "mistyped")
    connection = await connect(database_url)
    await connection.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    await connection.execute("UPDATE schema_compatibility SET oldest_revision = 'of_tomorrow'")
    await connection.close()
    with pytest.raises(DatabaseNotUsable, match=r"newer version .* at of_tomorrow, .* Install the newer version"):
        await schema.upgrade(database_url)


async def test_a_newer_database_that_this_version_can_serve_on_is_left_alone(
    database_url: str, settings: Settings
) -> None:
    """A replica of the older version that restarts while the new one rolls out starts, and is ready."""
    connection = await connect(database_url)
    await connection.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    await connection.close()
    await prepare(database_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
    async with open_api(database_url, settings) as api:
        assert (await api.http.get("/readyz")).status_code == 200
        assert (await api.beat(await api.register())).status_code == 200
    assert await revisions.current_revision(database_url) == "of_tomorrow"


@pytest.mark.parametrize(
    ("revision", "oldest", "says"),
    [
        ("compatible", "compatible", None),
        ("of_tomorrow", "compatible", None),
        ("of_tomorrow", "registry", None),
        ("of_tomorrow", "of_today", "newer version"),
        ("of_tomorrow", None, "newer version"),
        ("refused", None, "lucid db upgrade"),
        ("registry", "registry", "lucid db upgrade"),
        (None, None, "lucid db upgrade"),
    ],
)
def test_a_version_serves_at_its_revision_and_ahead_of_it_while_it_is_not_too_old(
    revision: str | None, oldest: str | None, says: str | None
) -> None:
    """`oldest` is the oldest revision whose replicas can serve: a version that knows it is new enough."""
    revision = revisions.head_revision() if revision == "compatible" else revision
    misfit = revisions.judge_revision(revision, oldest)
    assert misfit is None if says is None else says in str(misfit)


async def test_each_migration_commits_before_the_next(empty_url: str) -> None:
    """One that can't have its lock undoes none before it, and holds no lock of its own meanwhile."""
    await schema.upgrade(empty_url, "signals")
    connection = await connect(empty_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE webhooks IN ACCESS SHARE MODE")
            with pytest.raises(DatabaseNotUsable, match=r"pg_stat_activity, end it .* reached stay"):
                await schema.upgrade(empty_url, patience_seconds=0)
            assert await revisions.current_revision(empty_url) == "money"
        await schema.upgrade(empty_url)
        assert await revisions.current_revision(empty_url) == revisions.head_revision()
        await schema.check(empty_url)
    finally:
        await connection.close()


async def test_a_migration_waits_a_second_for_a_lock_and_tries_again(database_url: str) -> None:
    """Meanwhile requests that queued up behind it run."""
    connection, tries = await connect(database_url), asyncio.Event()

    def add_column(there: Connection) -> None:
        there.execute(text("SET LOCAL lock_timeout = 100"))
        there.execute(text("CREATE TABLE IF NOT EXISTS half_done (n int)"))
        tries.set()
        there.execute(text("ALTER TABLE webhooks ADD COLUMN added int"))

    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE webhooks IN ACCESS SHARE MODE")
            migrating = asyncio.create_task(schema.run_locked(database_url, add_column))
            for _ in range(2):
                tries.clear()
                await asyncio.wait_for(tries.wait(), 20)
            assert await connection.fetchval("SELECT to_regclass('half_done')") is None
        await migrating
        assert await connection.fetchval("SELECT count(added) FROM webhooks") == 0
    finally:
        await connection.close()


async def test_an_index_is_built_while_other_replicas_wait_for_their_turn(database_url: str) -> None:
    """CREATE INDEX CONCURRENTLY waits for every statement that runs: no replica may wait inside one."""
    is_building = asyncio.Event()

    def build(there: Connection) -> None:
        is_building.set()
        there.commit()
        there.execution_options(isolation_level="AUTOCOMMIT")
        there.execute(text("SELECT pg_sleep(0.3)"))
        there.execute(text("CREATE INDEX CONCURRENTLY IF NOT EXISTS built ON passports (name)"))

    async def wait_for_turn() -> None:
        await is_building.wait()
        await schema.run_locked(database_url, lambda _: None)

    async with asyncio.timeout(30):
        await asyncio.gather(schema.run_locked(database_url, build), wait_for_turn(), wait_for_turn())


async def test_a_database_that_is_not_there_is_named() -> None:
    """The sentence says what to look at."""
    with pytest.raises(DatabaseNotUsable, match="could not be reached"):
        await check_usable("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseNotUsable, match="must look like"):
        await check_usable("mysql://somewhere")
