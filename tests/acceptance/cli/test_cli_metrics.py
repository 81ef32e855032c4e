"""`lucid metrics` and `lucid uptime` beside a real service: what was routed, step by step, and error budgets."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway, chat_answer, open_gateway
from tests.lucid_serve import serving


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    """A service of the test's own."""
    with serving(database_url) as served:
        async with open_gateway(served) as opened:
            yield opened


async def test_a_provider_reads_what_happened_and_its_error_budget(gateway: Gateway, tmp_path: Path) -> None:
    lucid = CommandLine(gateway.served.url, gateway.served.admin_key, tmp_path)
    assert (await lucid("uptime")).out == "No nodes.\n"
    async with (
        FaultNode(Behaviour(answer=chat_answer("said " * 100, tokens_in=600, tokens_out=400))) as node,
        FaultNode(Behaviour(answer=respond(b"{}", status=500))) as bad,
    ):
        model, failing = await gateway.add_model(), await gateway.add_model()
        good = await gateway.add_node(node.url, model, pricePer1kTokens="0.5")
        failed = await gateway.add_node(bad.url, failing)
        for name in (model, failing):
            await gateway.chat(name, messages=[{"role": "user", "content": "said" * 200}])
            await gateway.jobs(name)
    shown = (await lucid("metrics", good)).out
    (in_all,) = [line.split() for line in shown.splitlines() if line.startswith("in all")]
    assert in_all[2:4] == ["1", "0"]
    assert "0.5000" in in_all
    assert "CHARGED is what was charged" in shown
    assert "Failures: http_500 1." in (await lucid("metrics", failed, "--from", "-1h")).out
    told = (await lucid("metrics", "--from", "10m", "--step", "1m", "--json")).json
    assert (told["step"], told["totals"]["requests"], told["totals"]["tokensIn"]) == ("1m", 2, 600)
    lines = (await lucid("metrics", "--series", "requests,failures", "--csv")).out
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert [sum(int(row[name] or 0) for row in rows) for name in ("requests", "failures.http_500")] == [2, 1]
    assert rows[-1]["time"] <= datetime.now(UTC).isoformat()

    assert (await lucid("uptime", "--json")).json.keys() == {"owner", "target", "windows", "nodes"}
    assert "2 nodes together, by the time of each, against 99.000 %" in (await lucid("uptime", "--target", "0.99")).out
    assert [window["days"] for window in (await lucid("uptime", good, "--json")).json["windows"]] == [1, 7, 30]
    assert (await lucid("uptime", good)).out.splitlines()[0].split()[:2] == ["DAYS", "UPTIME"]
    for wrong, status in (
        (("metrics", "--csv", "--json"), 2),
        (("metrics", "--from", "yesterday"), 2),
        (("metrics", good, "--owner", "acme"), 2),
        (("metrics", "--series", "nonsense"), 1),
        (("uptime", "--target", "2"), 1),
        (("uptime", "unknown"), 5),
    ):
        assert (await lucid(*wrong)).status == status, wrong
