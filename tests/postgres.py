"""The Postgres of a test run: one server, one migrated template on which no session stays, a clone for each test."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from lucid_compute.storage import schema
from lucid_compute.storage.database import connect
from lucid_compute.storage.embedded_postgres import EmbeddedPostgres

OWN_SERVER_SETTING = "LUCID_TEST_DATABASE_URL"
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=300")


class TestServer:
    """A Postgres for one run of the tests: its own embedded one, or the one that LUCID_TEST_DATABASE_URL names."""

    __test__ = False

    def __init__(self) -> None:
        """Start it, and build the template that each test's database is cloned from."""
        self._run_id = uuid4().hex[:8]
        self._folder: Path | None = None
        self._postgres: EmbeddedPostgres | None = None
        self.url = os.environ.get(OWN_SERVER_SETTING) or self._start_embedded()
        self.template = f"lucid_test_{self._run_id}_template"
        asyncio.run(self._build_template())

    def stop(self) -> None:
        """Drop the template, and stop the server if it is our own."""
        if self._postgres is None:
            asyncio.run(execute(self.url, f'DROP DATABASE IF EXISTS "{self.template}" WITH (FORCE)'))
            return
        self._postgres.stop(immediately=True)
        with suppress(OSError):
            cluster = (self._folder or Path("/nowhere")) / "postgres"
            shutil.rmtree(cluster.resolve())
            shutil.rmtree(self._folder or "")

    def _start_embedded(self) -> str:
        self._folder = Path(tempfile.mkdtemp(prefix="lucid-test-"))
        self._postgres = EmbeddedPostgres(self._folder, options=FAST)
        self._postgres.start()
        return self._postgres.url()

    async def _build_template(self) -> None:
        await execute(self.url, f'CREATE DATABASE "{self.template}"')
        await schema.upgrade(with_database(self.url, self.template))


async def clone(url: str, template: str) -> str:
    """Make a database like `template`; answer its URL."""
    name = template.replace("template", uuid4().hex[:12])
    await execute(url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return with_database(url, name)


async def make_empty(server: str) -> str:
    """Make a database without a table; return its URL."""
    name = f"lucid_test_empty_{uuid4().hex[:12]}"
    await execute(server, f'CREATE DATABASE "{name}"')
    return with_database(server, name)


async def drop(url: str) -> None:
    """Drop the database of this URL, whoever is connected to it."""
    name = urlsplit(url).path.strip("/")
    await execute(with_database(url, "postgres"), f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def with_database(url: str, name: str) -> str:
    """Answer the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def execute(url: str, statement: str) -> None:
    """Run one statement on a connection of its own."""
    connection = await connect(url, application="lucid tests", lock_timeout_seconds=0, timeout_seconds=60)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
