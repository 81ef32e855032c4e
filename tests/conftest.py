"""Fixtures: a database for each test, a replica on it, and a client that speaks to the whole application."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import Config

from lucid_compute.server.settings import Settings
from tests import FORM, postgres
from tests.api import ADMIN_KEY, Adjust, Api, leave_as_built, open_api
from tests.authority import Authority, make_authority
from tests.browser import MISSING, Chromium, find_chromium
from tests.express_client import Entrance, FastPath

_run = pytest.StashKey[postgres.TestRun]()


def pytest_configure(config: Config) -> None:
    """Take Ctrl-C as a terminal's programs do, for those that tests start: a shell's background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        config.stash[_run] = postgres.TestRun()


def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist which run it belongs to."""
    node.workerinput["lucid_run_folder"] = str(node.config.stash[_run].folder)


def pytest_unconfigure(config: Config) -> None:
    """Let the server end that a test of this run has started."""
    if (run := config.stash.get(_run, None)) is not None:
        run.end()


def pytest_collection_modifyitems(config: Config, items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no process is left alone with one at the end.

    Leave out what needs a browser where there is none; in CI it stays, and fails with what to do.
    """
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
    if not lacks_browser():
        return
    left_out = [item for item in items if "chromium" in getattr(item, "fixturenames", ())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Spare garbage collections the modules, which stay: a third of a million objects."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: Config) -> list[str]:
    """Say that tests are left out, and why."""
    return [f"the dashboard's tests in a browser are left out. {MISSING}"] if lacks_browser() else []


def lacks_browser() -> bool:
    """Return whether tests in a browser are left out."""
    return find_chromium() is None and os.environ.get("CI", "") not in {"true", "1"}


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests; each opens pages of its own."""
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def postgres_and_template(request: pytest.FixtureRequest) -> postgres.Server:
    """The URL of the run's server, and the name of the database that is cloned; the first test that asks starts it."""
    workerinput: dict[str, str] | None = getattr(request.config, "workerinput", None)
    folder = Path(workerinput["lucid_run_folder"]) if workerinput else request.config.stash[_run].folder
    return postgres.ask_for_server(folder)


@pytest.fixture
async def database_url(postgres_and_template: tuple[str, str]) -> AsyncIterator[str]:
    """A migrated, empty database of the test's own."""
    url = await postgres.clone(*postgres_and_template)
    yield url
    await postgres.drop(url)


@pytest.fixture
async def empty_url(postgres_and_template: tuple[str, str]) -> AsyncIterator[str]:
    """A database of the test's own without a table."""
    url = await postgres.make_empty(postgres_and_template[0])
    yield url
    await postgres.drop(url)


@pytest.fixture
def settings() -> Settings:
    """The settings of the replica under test, nothing of them from the environment."""
    return Settings(bootstrap_admin_key=ADMIN_KEY)


@pytest.fixture
def adjust() -> Adjust:
    """Changes bounds of the replica under test before it runs; files of tests with other bounds override it."""
    return leave_as_built


@pytest.fixture
async def api(database_url: str, settings: Settings, adjust: Adjust) -> AsyncIterator[Api]:
    """A client of one replica on a database of its own, with an admin's key."""
    async with open_api(database_url, settings, adjust) as opened:
        yield opened


@pytest.fixture(params=["by ASGI", "on the fast path"])
def entrance(request: pytest.FixtureRequest) -> Entrance:
    """Each entrance of the lanes in turn: every guard stands at both."""

    def at(api: Api) -> Api:
        return Api(api.app, api.key, FastPath(api.app)) if request.param == "on the fast path" else api

    return at


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that clients trust, because the system's list of them is replaced by it."""
    made = make_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    return made


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings of whoever runs the tests, but for the server they choose."""
    for name in list(os.environ):
        if name.startswith("LUCID_") and name not in {postgres.OWN_SERVER_SETTING, *FORM}:
            monkeypatch.delenv(name)
