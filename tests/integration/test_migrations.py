"""Migrations: up and down on a filled database, and the same tables as the code says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from lucid_compute.api.settings import Settings
from lucid_compute.storage import schema
from lucid_compute.storage.database import DatabaseNotUsable, check_usable, connect
from lucid_compute.storage.preparation import prepare
from tests.api import ADMIN_KEY, open_api


async def test_migrations_go_down_and_up_on_a_filled_database(database_url: str, settings: Settings) -> None:
    """Down to nothing and up again, the service works on it as on a new one."""
    for _ in range(2):
        async with open_api(database_url, settings) as api:
            node_id = await api.register()
            await api.add_model("m", aliases=["n"])
            assert (await api.beat(node_id, bootId="b", sequence=1)).status_code == 200
            await api.http.post(f"/compute/drain/{node_id}")
        await schema.downgrade(database_url, "base")
        assert await schema.current_revision(database_url) is None
        await prepare(database_url, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)
        assert await schema.current_revision(database_url) == schema.head_revision()


async def test_the_migrations_make_what_the_tables_say(database_url: str) -> None:
    """A table changed without a migration is noticed."""
    await schema.check(database_url)


async def test_replicas_that_start_together_migrate_once(postgres_and_template: tuple[str, str]) -> None:
    """The others wait, and find it done; one admin key is made between them."""
    from tests import postgres

    url, _ = postgres_and_template
    name = f"{postgres_and_template[1]}_empty"
    await postgres.execute(url, f'CREATE DATABASE "{name}"')
    empty = postgres.with_database(url, name)
    try:
        made = await asyncio.gather(
            *(prepare(empty, data_dir=Path("/nonexistent"), bootstrap_admin_key=None) for _ in range(4))
        )
        assert sum(result.admin_key is not None for result in made) == 1
    finally:
        await postgres.drop(empty)


async def test_the_audit_trail_can_only_grow(database_url: str) -> None:
    """Neither an UPDATE nor a DELETE gets through, whoever tries."""
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
    await connection.close()
    with pytest.raises(DatabaseNotUsable, match=r"newer version .* at of_tomorrow, .* Install the newer version"):
        await schema.upgrade(database_url)


async def test_a_database_that_is_not_there_is_named() -> None:
    """The sentence says what to look at."""
    with pytest.raises(DatabaseNotUsable, match="could not be reached"):
        await check_usable("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseNotUsable, match="must look like"):
        await check_usable("mysql://somewhere")
