"""What a worker has in memory: the modules that it runs, and none that only other processes need."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.lucid_serve import Served, folder

# What other processes need, and why a worker has none of it.
FOREIGN = {
    "alembic": "the preparation migrates, and only when there is something to migrate",
    "mako": "Alembic's",
    "sqlalchemy.orm": "we use SQLAlchemy's Core",
    "prometheus_client": "the first scrape imports it",
    "opentelemetry.sdk": "the packages of an extra",
    "httpx": "the SDK's",
    "rich": "the command line prints with it",
    "pygments": "rich's and Mako's",
    "markdown_it": "rich's",
    "pynvml": "the agent's",
    "lucid_compute.agent": "another process",
    "lucid_compute.client": "the SDK",
    "lucid_compute.postgres.schema": "it imports Alembic",
    "lucid_compute.postgres.backup": "`lucid db` backs up",
}
# As `lucid`, but each process writes the modules that it has when it ends.
PROGRAM = """
import json, logging, os, sys

class LastHandler(logging.Handler):
    def close(self):
        with open(f"modules.{os.getpid()}", "w") as file:
            json.dump(sorted(sys.modules), file)

last = LastHandler()
from lucid_compute.cli.main import main
main()
"""
LEAN = """
import sys
from lucid_compute.postgres.lean_sqlalchemy import leave_out_orm
leave_out_orm()
import lucid_compute.postgres.database as database
print("sqlalchemy.orm" in sys.modules)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
print("sqlalchemy.orm" in sys.modules, AsyncEngine is database.AsyncEngine, AsyncSession.__module__)
"""


class ServedWithLists(Served):
    """A `lucid serve` whose processes leave lists of their modules in its folder."""

    command = (sys.executable, "-c", PROGRAM, "serve")

    def modules(self, pid: int) -> set[str]:
        """Return the modules that the process had."""
        return set(json.loads((self.folder / f"modules.{pid}").read_text()))


async def test_a_worker_has_only_modules_that_it_runs(database_url: str) -> None:
    """Each module is memory of every worker, and time of every start."""
    with folder() as made:
        with ServedWithLists(made, database_url, WORKERS="2") as served:
            workers = served.workers()
            async with served.client() as admin:
                for path in ("/readyz", "/passports", "/models", "/openapi.json", "/dashboard/"):
                    assert (await admin.get(path)).status_code == 200
        assert len(workers) == 2
        for worker in workers:
            modules = served.modules(worker)
            assert {"lucid_compute.server.app", "fastapi", "sqlalchemy"} <= modules
            assert {name: why for name, why in FOREIGN.items() if name in modules} == {}


async def test_a_scrape_and_a_migration_load_what_they_need(empty_url: str) -> None:
    """In the worker that is scraped, and in a process that ends."""
    with folder() as made:
        with ServedWithLists(made, empty_url) as served:
            (worker,) = served.workers()
            async with served.client() as admin:
                assert "lucid_workers 1" in (await admin.get("/metrics")).text
        assert "prometheus_client" in served.modules(worker)
        assert "alembic" not in served.modules(worker)
        assert any("alembic" in json.loads(file.read_text()) for file in made.glob("modules.*"))


def test_the_orm_is_there_as_soon_as_it_is_asked_for() -> None:
    """Other code in the process finds SQLAlchemy complete, with the same classes."""
    ran = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True", "True", "sqlalchemy.ext.asyncio.session"]
