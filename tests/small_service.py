"""A service of three paths under the real supervisor, run by path: `/`, `/slow?SECONDS` and `/database`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from lucid_compute.accounting.payouts.revenue import Terms
from lucid_compute.postgres.embedded import EmbeddedPostgres
from lucid_compute.server.metrics.shared_memory import WorkerSlot
from lucid_compute.server.settings import Settings
from lucid_compute.server.supervisor import ServedProgram, Supervisor

KEY = "lk_live_new"


class Prepared(NamedTuple):
    """What the preparation answers."""

    admin_key: str | None
    admin_key_file: Path


async def prepare(database_url: str, *, data_dir: Path, bootstrap_admin_key: str | None, terms: Terms) -> Prepared:
    """Keep a key as the real one does; ask the database when PREPARE says so."""
    assert terms.are_whole
    if os.environ.get("PREPARE") == "connect":
        await asyncpg.connect(database_url, timeout=2)
    file = data_dir / "admin.key"
    is_first = not file.exists()
    file.write_text(KEY)
    return Prepared(KEY if is_first and bootstrap_admin_key is None else None, file)


async def answer(scope: dict[str, Any], database_url: str) -> str:
    """Return the worker's process, after a pause for `/slow`, or the database's word for `/database`."""
    if scope["path"] == "/slow":
        await asyncio.sleep(float(scope["query_string"]))
    if scope["path"] != "/database":
        return str(os.getpid())
    connection = await asyncpg.connect(database_url, timeout=2)
    try:
        return str(await connection.fetchval("SELECT 42"))
    finally:
        await connection.close()


def create_app(_settings: Settings, database_url: str, _slot: WorkerSlot) -> Callable[..., Awaitable[None]]:
    """Return the application; BROKEN breaks its lifespan."""

    async def app(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            assert "BROKEN" not in os.environ
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        body = await answer(scope, database_url)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": body.encode()})

    return app


def main() -> int:
    """Serve as `lucid serve` does."""
    settings = Settings()
    postgres = EmbeddedPostgres(settings.data_dir, options=["fsync=off"], system_dir=Path(os.environ["SYSTEM_DIR"]))
    return Supervisor(settings, ServedProgram(prepare, create_app), None if settings.database_url else postgres).run()


if __name__ == "__main__":
    sys.exit(main())
