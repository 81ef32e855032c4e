"""The ASGI factory below a real uvicorn, as an operator starts it beside `lucid serve`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from lucid_compute.postgres.embedded.processes import processes_of
from tests.api import ADMIN_KEY
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import READY_TIMEOUT_SECONDS, STOP_TIMEOUT_SECONDS, folder

UVICORN = (
    Path(sys.executable).with_name("uvicorn"),
    "--factory",
    "lucid_compute.server.asgi:create",
    "--port",
    "0",
)


@contextmanager
def uvicorn(place: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start it in `place`; yields the process and the file of what it says."""
    said = place / "uvicorn.log"
    environment = {"PATH": os.defpath, "HOME": str(place), **{f"LUCID_{name}": at for name, at in settings.items()}}
    with said.open("wb") as output:
        process = subprocess.Popen(UVICORN, cwd=place, env=environment, stdout=output, stderr=output)
    try:
        yield process, said
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_SECONDS)


def address(process: subprocess.Popen[bytes], said: Path) -> str:
    """Return its URL once it serves."""
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    while (found := re.search(r"running on (http://\S+)", said.read_text())) is None:
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found[1]


def register_and_beat(url: str, key: str) -> None:
    """Register a node, and send its first heartbeat."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client:
        assert client.get("/readyz").status_code == 200
        node = client.post("/passports", json=GUIDE_PASSPORT).json()["id"]
        body = {"passportId": node, "status": "healthy", "load": 0.5, "availableModels": [], "queueDepth": 0}
        assert client.post("/compute/heartbeat", json=body).status_code == 200


def register_on_loopback(url: str, key: str) -> int:
    """Return how the registration of a node on this machine is answered."""
    metadata = {**GUIDE_PASSPORT["metadata"], "inferenceUrl": "http://127.0.0.1:9000/v1"}
    body = {**GUIDE_PASSPORT, "name": "near", "metadata": metadata}
    return httpx.post(f"{url}/passports", json=body, headers={"Authorization": f"Bearer {key}"}).status_code


def test_uvicorn_serves_on_the_database_of_the_environment(tmp_path: Path, database_url: str) -> None:
    """It may listen anywhere, so a node on this machine is refused, unless LUCID_HOST says that only it can ask."""
    settings = {"DATABASE_URL": database_url, "BOOTSTRAP_ADMIN_KEY": ADMIN_KEY, "DATA_DIR": str(tmp_path / "data")}
    with uvicorn(tmp_path, **settings) as (process, said):
        register_and_beat(url := address(process, said), ADMIN_KEY)
        assert register_on_loopback(url, ADMIN_KEY) == 422
    assert ADMIN_KEY not in said.read_text()
    with uvicorn(tmp_path, HOST="127.0.0.1", **settings) as (process, said):
        assert register_on_loopback(address(process, said), ADMIN_KEY) == 201


def test_uvicorn_runs_a_postgres_in_the_data_folder() -> None:
    """The admin key is shown at the first start, and Postgres stops with the server."""
    with folder() as made:
        data_dir = made / "data"
        with uvicorn(made, DATA_DIR=str(data_dir)) as (process, said):
            register_and_beat(address(process, said), (data_dir / "admin.key").read_text().strip())
        assert "shown this once, kept in" in said.read_text()
        with uvicorn(made, DATA_DIR=str(data_dir)) as (process, said):
            address(process, said)
        assert "shown this once" not in said.read_text()
        assert not processes_of((data_dir / "postgres").resolve())


def test_uvicorn_says_in_a_sentence_what_it_can_not_use(tmp_path: Path) -> None:
    """A database that is away, and a setting that is refused without being shown."""
    with uvicorn(tmp_path, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none") as (process, said):
        assert process.wait(READY_TIMEOUT_SECONDS) != 0
    assert "The database could not be reached" in said.read_text()
    assert "Traceback" not in said.read_text()
    with uvicorn(tmp_path, BOOTSTRAP_ADMIN_KEY="guessable") as (process, said):
        assert process.wait(READY_TIMEOUT_SECONDS) != 0
    assert (
        said.read_text()
        == "LUCID_BOOTSTRAP_ADMIN_KEY: Set a key of 24 to 512 characters, or none. See: lucid settings\n"
    )
