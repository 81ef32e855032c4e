"""Sessions of Postgres: several servers, words of the URL, and sessions that lead to a server that takes no writes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import text

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import Database, DatabaseNotUsable, check_usable, connect
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.other_replicas import run_sql, until

WRITE = text("UPDATE replicas SET seen_at = seen_at WHERE false")


def behind(database_url: str, host: str, port: int) -> str:
    """The URL with another server before its own."""
    query = parse_qs(urlsplit(database_url).query)
    if "host" in query:
        return f"{database_url.partition('?')[0]}?host={host},{query['host'][0]}&port={port},{query['port'][0]}"
    parts = urlsplit(database_url)
    login, _, own = parts.netloc.rpartition("@")
    return database_url.replace(parts.netloc, f"{login}@{host}:{port},{own}")


async def test_a_server_that_refuses_is_passed_over(database_url: str) -> None:
    url = behind(database_url, "127.0.0.1", 1)
    await check_usable(url)
    connection = await connect(url)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_a_server_that_says_nothing_leaves_time_for_the_next_and_is_then_tried_last(database_url: str) -> None:
    """Packets to a machine that is gone are answered by nobody."""
    callers: list[asyncio.StreamWriter] = []
    mute = await asyncio.start_server(lambda _, writer: callers.append(writer), "127.0.0.1", 0)
    url = behind(database_url, *mute.sockets[0].getsockname())
    for _ in range(3):
        connection = await connect(url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    assert len(callers) == 1
    for caller in callers:
        caller.close()
        with suppress(OSError):
            await caller.wait_closed()
    mute.close()


async def test_when_no_server_can_be_used_it_is_said(database_url: str) -> None:
    with pytest.raises(DatabaseNotUsable, match="could not be reached"):
        await check_usable("postgresql://nobody@127.0.0.1:1,127.0.0.1:2/none")
    await run_as_owner(database_url, "ALTER DATABASE {} SET default_transaction_read_only = on")
    with pytest.raises(DatabaseNotUsable, match=r"read-only or a standby.*default_transaction_read_only"):
        await check_usable(database_url)


async def run_as_owner(database_url: str, statement: str) -> None:
    """Run a statement about the database, named {} in it, from a session that may write in any case."""
    name = urlsplit(database_url).path.strip("/")
    connection = await connect(database_url.replace(name, "postgres"))
    try:
        await connection.execute(statement.format(f'"{name}"'))
    finally:
        await connection.close()


async def test_a_word_that_postgres_does_not_know_is_named(database_url: str) -> None:
    with pytest.raises(DatabaseNotUsable, match=r"a word that Postgres refuses .*unheard_of"):
        await check_usable(f"{database_url}&unheard_of=1")


async def test_words_of_hosted_postgres_work(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Settings reach the server; what is ignored is named in the log, once, at the start."""
    words = "pgbouncer=true&connect_timeout=5&application_name=prod&keepalives=1&options=-c%20work_mem%3D7MB"
    url = f"{database_url}&{words}&channel_binding=prefer&gssencmode=disable&sslsni=1"
    with caplog.at_level("INFO"):
        await check_usable(url)
    assert {record.message.split()[1] for record in caplog.records} >= {"pgbouncer", "keepalives", "sslsni"}
    connection = await connect(url, application="lucid feed")
    assert await connection.fetchval("SHOW work_mem") == "7MB"
    assert await connection.fetchval("SHOW application_name") == "prod lucid feed"
    await connection.close()


async def test_a_schema_of_the_urls_own_holds_every_table(empty_url: str, settings: Settings) -> None:
    """As other tools' URLs say: `schema=`."""
    connection = await connect(empty_url)
    await connection.execute('CREATE SCHEMA "Of Lucid"')
    url = f"{empty_url}&schema=Of%20Lucid"
    await schema.upgrade(url)
    await schema.check(url)
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await connection.close()
    async with open_api(url, settings) as api:
        assert (await api.http.get("/readyz")).status_code == 200


async def test_sessions_that_lead_to_a_standby_are_replaced_all_at_once(database_url: str) -> None:
    """Postgres says so at the first write; all sessions of the pool lead there."""
    database = Database(database_url, pool_size=3)

    async def make_read_only(gate: asyncio.Barrier) -> None:
        async with database.transaction() as connection:
            await gate.wait()
            await connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))

    barrier = asyncio.Barrier(3)
    await asyncio.gather(*(make_read_only(barrier) for _ in range(3)))
    with pytest.raises(DatabaseUnavailable):
        async with database.transaction() as connection:
            await connection.execute(WRITE)
    for _ in range(4):
        async with database.transaction() as connection:
            await connection.execute(WRITE)
    await database.close()


async def test_a_full_queue_of_notifications_is_an_outage_that_passes(database_url: str) -> None:
    """Every commit fails while it is full; the queue has gigabytes, so Postgres's error is raised by hand."""
    database = Database(database_url, pool_size=1)
    full = "RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = 'program_limit_exceeded'"
    with pytest.raises(DatabaseUnavailable):
        async with database.transaction() as connection:
            await connection.execute(text(f"DO $$ BEGIN {full}; END $$"))
    await database.close()


async def test_a_session_that_postgres_ends_is_replaced(database_url: str) -> None:
    """At a shutdown it says so, and closes it."""
    database = Database(database_url, pool_size=1)
    async with database.transaction() as connection:
        process = await connection.scalar(text("SELECT pg_backend_pid()"))
    await run_as_owner(database_url, f"SELECT pg_terminate_backend({process}) /* {{}} */")
    with suppress(DatabaseUnavailable):
        async with database.transaction() as connection:
            await connection.execute(WRITE)
    async with database.transaction() as connection:
        assert await connection.scalar(text("SELECT pg_backend_pid()")) != process
    await database.close()


async def test_a_dedicated_session_that_leads_to_a_standby_is_replaced(database_url: str) -> None:
    dedicated = DedicatedConnection(database_url, Purpose.JOBS, session="SET default_transaction_read_only = on")

    async def write() -> int:
        async with dedicated.within(5.0) as connection:
            process = int(await connection.fetchval("SELECT pg_backend_pid()"))
            processes.append(process)
            await connection.execute("UPDATE replicas SET seen_at = seen_at WHERE false")
            return process

    processes: list[int] = []
    for _ in range(2):
        with pytest.raises(Exception, match="read-only transaction"):
            await write()
    assert len(set(processes)) == 2
    await dedicated.close()


async def test_readyz_says_no_while_writes_fail_and_why(api: Api, database_url: str) -> None:
    """And the service recovers without a restart."""
    assert (await api.http.get("/readyz")).status_code == 200
    await run_as_owner(database_url, "ALTER DATABASE {} SET default_transaction_read_only = on")
    end_sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE '\"' || datname || '\"' = '{}'"
    await run_as_owner(database_url, end_sessions)
    answer = await api.http.get("/readyz")
    assert answer.status_code == 503

    async def says_why() -> bool:
        answer = await api.http.get("/readyz")
        assert answer.status_code == 503
        return "takes no writes" in answer.json()["error"]["message"]

    await until(says_why, 20)
    assert (await api.http.post("/passports", json={})).status_code in {401, 422, 503}
    await run_as_owner(database_url, "ALTER DATABASE {} RESET default_transaction_read_only")

    async def is_ready() -> bool:
        return (await api.http.get("/readyz")).status_code == 200

    await until(is_ready, 20)
    assert (await api.beat(await api.register())).status_code == 200


async def test_readyz_says_no_while_a_pool_of_old_sessions_can_not_write(api: Api) -> None:
    """It finds out by itself, and so replaces them: no request has to fail first."""
    size = api.replica.settings.database_pool_size
    barrier = asyncio.Barrier(size)

    async def make_read_only() -> None:
        async with api.replica.database.transaction() as connection:
            await barrier.wait()
            await connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))

    await asyncio.gather(*(make_read_only() for _ in range(size)))
    answer = await api.http.get("/readyz")
    assert answer.status_code == 503
    assert "takes no writes" in answer.json()["error"]["message"]
    assert (await api.http.get("/readyz")).status_code == 200
    await api.register()
    assert await run_sql(api, "SELECT count(*) FROM passports") == [(1,)]


async def test_a_transaction_has_all_of_its_time_however_long_it_waited(database_url: str) -> None:
    """It commits later than the time limit after it was asked for, on the same connection."""
    database = Database(database_url, pool_size=1, timeout_seconds=5.0)
    clock = asyncio.get_running_loop().time
    asked_at = clock()

    async def work() -> object:
        async with database.transaction() as connection:
            session = await connection.scalar(text("SELECT pg_backend_pid()"))
            await asyncio.sleep(max(asked_at + database.timeout_seconds + 0.2 - clock(), 0))
            await connection.execute(WRITE)
            return session

    async with database.transaction() as connection:
        first = await connection.scalar(text("SELECT pg_backend_pid()"))
        waiting = asyncio.create_task(work())
        await asyncio.sleep(asked_at + 3.0 - clock())
        assert not waiting.done()
    assert await waiting == first
    await database.close()
