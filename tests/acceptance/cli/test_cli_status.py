"""`lucid status` and `lucid audit`, and the order of `lucid nodes`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lucid_compute import __version__
from tests.command_line import CommandLine
from tests.gateway import Gateway, open_gateway
from tests.lucid_serve import serving

NOWHERE = "http://gpu.example.com:8000"


@pytest.fixture
async def fleet(database_url: str) -> AsyncIterator[Gateway]:
    """A service of the test's own, so that all that needs attention is the test's."""
    with serving(database_url) as served:
        async with open_gateway(served) as opened:
            yield opened


@pytest.fixture
def admin(fleet: Gateway, tmp_path: Path) -> CommandLine:
    """The command line of its admin."""
    return CommandLine(fleet.served.url, fleet.served.admin_key, tmp_path)


async def test_status_says_what_needs_attention(fleet: Gateway, admin: CommandLine) -> None:
    """By its exit status, too: 0 with nothing, 1 with a sick node; 3 without a service."""
    well = await admin("status")
    assert (well.status, well.out.splitlines()[-1]) == (0, "Nothing needs attention.")
    assert f"version    {__version__} on Python 3." in well.out
    model = await fleet.add_model()
    await fleet.add_node(NOWHERE, model)
    sick = await fleet.add_node(NOWHERE, beat={"status": "unhealthy", "detail": "CUDA error"})
    name = (await fleet.admin.get(f"/passports/{sick}")).json()["name"]
    shown = await admin("status")
    assert shown.status == 1
    assert "nodes      2: 1 healthy, 0 draining, 1 unhealthy" in shown.out
    assert "models     1: 1 available, 1 served" in shown.out
    assert re.search(rf"{name} +unhealthy +\d+ s ago +CUDA error", shown.out)
    found = (await admin("status", "--json")).json
    assert (found["ok"], [node["id"] for node in found["needsAttention"]["nodes"]]) == (False, [sick])
    assert found["readiness"]["version"] == __version__
    consumer = await admin("status", "--key", fleet.key)
    assert (consumer.status, "can't see nodes" in consumer.out) == (0, True)
    assert (await admin("status", "--api", "http://127.0.0.1:1")).status == 3
    assert [row.split()[1] for row in (await admin("nodes")).out.splitlines()[1:3]] == ["unhealthy", "healthy"]
    by_name = [row.split()[0] for row in (await admin("nodes", "--sort", "name")).out.splitlines()[1:3]]
    assert by_name == sorted(by_name)


async def test_the_audit_trail_with_filters(fleet: Gateway, admin: CommandLine) -> None:
    """By target, action, actor and time, with names instead of ids, as a table, CSV and JSON."""
    node = await fleet.add_node(NOWHERE)
    name = (await fleet.admin.get(f"/passports/{node}")).json()["name"]
    for command in (
        ("drain", name, "--no-wait"),
        ("resume", name),
        ("keys", "create", "=k", "--owner", "o", "--scope", "compute"),
    ):
        assert (await admin(*command)).status == 0
    lines = (await admin("audit", name)).out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["compute.resume", "compute.drain", "passport.create"]
    assert all(f"node {name}" in line and " admin " in line and node not in line for line in lines[1:])
    found = (await admin("audit", "--action", "compute", "--by", "admin", "--since", "1h", "--json")).json["events"]
    assert [event["action"] for event in found] == ["compute.resume", "compute.drain"]
    rows = list(csv.DictReader(io.StringIO((await admin("audit", "--action", "key.create", "--csv")).out)))
    assert ("=k" in {row["target"] for row in rows}, "'=k" in {row["target"] for row in rows}) == (False, True)
    assert len((await admin("audit", "--limit", "2", "--json")).json["events"]) == 2
    assert (await admin("audit", "--until", "1d")).out == "Nothing of the kind is in the audit trail.\n"
    assert (await admin("audit", "--by", "nobody", "--json")).json == {"events": []}
    await admin("passports", "create", name, "--type", "model", "--set", "format=gguf")
    ambiguous = await admin("audit", name)
    assert (ambiguous.status, f"{node} (compute)" in ambiguous.sentence) == (2, True)
    assert (await admin("audit", "--key", fleet.key)).status == 4
