"""`alembic` in a clone: it reaches the database that `lucid db` reaches, and writes the next migration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lucid_compute.postgres import revisions
from lucid_compute.postgres.database import connect
from tests import ROOT
from tests.lucid_serve import Served, folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The part of a clone that Alembic reads, where a migration may be written."""
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def alembic(clone: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [Path(sys.executable).with_name("alembic"), *arguments],
        cwd=clone,
        env={"PATH": os.defpath, "HOME": str(clone), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_alembic_goes_down_and_up_on_the_database_of_the_environment(clone: Path, database_url: str) -> None:
    """And says which revision the database is at."""
    there = {"LUCID_DATABASE_URL": database_url}
    assert alembic(clone, "current", **there).stdout == f"{revisions.head_revision()} (head)\n"
    down = alembic(clone, "downgrade", "base", **there)
    assert (down.returncode, "Running downgrade registry -> " in down.stderr) == (0, True)
    assert alembic(clone, "current", **there).stdout == ""
    assert alembic(clone, "upgrade", "head", **there).returncode == 0
    assert alembic(clone, "current", **there).stdout == f"{revisions.head_revision()} (head)\n"
    assert alembic(clone, "history").stdout.splitlines()[-1].startswith("<base> -> registry, The registry")
    assert "CREATE TABLE refusals" in alembic(clone, "upgrade", "head", "--sql").stdout


async def test_alembic_writes_the_next_migration(clone: Path, database_url: str) -> None:
    """Named as the others are; nothing is to be changed where the database is as the tables say."""
    there = {"LUCID_DATABASE_URL": database_url}
    assert "No new upgrade operations detected." in alembic(clone, "check", **there).stdout
    connection = await connect(database_url)
    await connection.execute("DROP TABLE refusals")
    await connection.close()
    assert "FAILED: New upgrade operations detected" in alembic(clone, "check", **there).stdout
    assert alembic(clone, "revision", "--autogenerate", "-m", "add refusals again", **there).returncode == 0
    (written,) = {path.name for path in (clone / "migrations" / "versions").glob("*.py")} - {
        path.name for path in (ROOT / "migrations" / "versions").glob("*.py")
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{4}_add_refusals_again\.py", written)
    text = (clone / "migrations" / "versions" / written).read_text()
    assert "op.create_table('refusals'" in text
    assert text.startswith('"""add refusals again."""\n')
    assert text.count("op.create_table") == 1


def test_alembic_finds_the_embedded_postgres_of_the_data_folder(clone: Path) -> None:
    """While the service runs, and when it does not: then a Postgres runs for the command alone."""
    with folder() as made, Served(made) as served:
        there = {"LUCID_DATA_DIR": str(served.data_dir)}
        running = alembic(clone, "current", **there)
        assert running.stdout == f"{revisions.head_revision()} (head)\n"
        served.stop()
        assert alembic(clone, "current", **there).stdout == running.stdout


def test_alembic_without_a_database_says_what_to_do(clone: Path) -> None:
    """One sentence, and no traceback; nothing is made."""
    nowhere = alembic(clone, "upgrade", "head")
    assert nowhere.returncode != 0
    assert re.fullmatch(r"FAILED: There is no database here: .* or set LUCID_DATABASE_URL\.\n", nowhere.stdout)
    assert not nowhere.stderr
    assert not (clone / "data").exists()
    away = alembic(clone, "current", LUCID_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert away.stdout.startswith("FAILED: The database could not be reached")
    assert not away.stderr
