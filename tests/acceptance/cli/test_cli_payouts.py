"""`lucid payouts` beside a real service: what was earned, statements, losses, and a period that is closed."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest

from lucid_compute.registry.domain.prices import total
from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway, chat_answer, open_gateway
from tests.lucid_serve import eventually, serving

REFUSED_SECONDS = 20.0  # what is refused is written every five seconds


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    """A service of the test's own, with terms of its own."""
    parts = {"PROVIDER": "9000", "MODEL_OWNER": "0", "PROTOCOL": "1000"}
    settings = {f"REVENUE_{part}_BPS": bps for part, bps in parts.items()}
    with serving(database_url, **settings) as served:
        async with open_gateway(served) as opened:
            yield opened


async def test_a_provider_sees_what_it_earned_and_an_admin_closes_a_period(gateway: Gateway, tmp_path: Path) -> None:
    lucid = CommandLine(gateway.served.url, gateway.served.admin_key, tmp_path)
    assert "Nothing was earned" in (await lucid("payouts")).out
    assert "Nothing was lost" in (await lucid("payouts", "losses")).out
    async with (
        FaultNode(Behaviour(answer=chat_answer("said " * 100, tokens_in=600, tokens_out=400))) as node,
        FaultNode(Behaviour(answer=respond(b"{}", status=500))) as bad,
    ):
        model, failing = await gateway.add_model(), await gateway.add_model()
        await gateway.add_node(node.url, model, pricePer1kTokens="0.5")
        await gateway.add_node(bad.url, failing)
        for name in (model, failing):
            await gateway.chat(name, messages=[{"role": "user", "content": "said" * 200}])
            await gateway.jobs(name)
        assert (await gateway.chat("unknown")).status_code == 404
    report = (await lucid("payouts", "--json")).json
    assert {each["role"]: Decimal(each["amountUsd"]) for each in report["totals"]} == {
        "provider": Decimal("0.45"),
        "model_owner": Decimal(0),
        "protocol": Decimal("0.05"),
    }
    shown = (await lucid("payouts")).out
    assert model in shown
    rows = list(csv.DictReader(io.StringIO((await lucid("payouts", "statement")).out)))
    lines, totals = ([row for row in rows if row["kind"] == kind] for kind in ("line", "total"))
    assert total(Decimal(row["amountUsd"]) for row in lines) == Decimal("0.5")
    assert total(Decimal(row["amountUsd"]) for row in totals) == Decimal("0.5")

    async def is_told() -> bool:
        losses = (await lucid("payouts", "losses", "--json")).json["losses"]
        return {(each["cause"], each["side"], each["requests"], each["refused"]) for each in losses} == {
            ("http_500", "provider", 1, 0),
            ("model_not_found", "client", 0, 1),
        }

    await eventually(is_told, REFUSED_SECONDS)
    shown = (await lucid("payouts", "losses")).out
    assert "http_500" in shown
    assert "1 request refused before any node was asked" in shown

    assert "No period is closed" in (await lucid("payouts", "periods")).out
    days = ("--from", "2026-01-01", "--to", "2026-02-01")
    unasked = await lucid("payouts", "close", *days)
    assert (unasked.status, "Pass --yes" in unasked.sentence) == (2, True)
    closed = await lucid("payouts", "close", *days, "--yes", "--json")
    assert (closed.json["from"], closed.json["to"]) == ("2026-01-01", "2026-02-01")
    assert (await lucid("payouts", "close", "--from", "2026-03-01", "--to", "2026-04-01", "--yes")).status == 1
    assert [each["id"] for each in (await lucid("payouts", "periods", "--json")).json["periods"]] == [closed.json["id"]]
    assert (await lucid("payouts", "--period", closed.json["id"], "--json")).json["lines"] == []
    assert (await lucid("payouts", "statement", "--period", closed.json["id"])).out.startswith("kind,day,owner")
    correct = (
        "payouts",
        "correct",
        closed.json["id"],
        "--role",
        "provider",
        "--owner",
        "acme",
        "--reason",
        "a wrong price",
    )
    assert (await lucid(*correct, "--amount=-0.5")).status == 2
    booked = await lucid(*correct, "--amount=-0.5", "--idempotency-key", "k", "--yes", "--json")
    assert booked.json["lines"] == [{"role": "provider", "owner": "acme", "amountUsd": "-0.5"}]
    assert (await lucid(*correct, "--amount=-0.5", "--idempotency-key", "k", "--yes", "--json")).json == booked.json
    assert (await lucid(*correct, "--amount=half", "--yes")).status == 1
    assert "a wrong price" in (await lucid("payouts")).out
    assert "correction," in (await lucid("payouts", "statement")).out
    assert (await lucid("payouts", "--period", "unknown")).status == 5
    assert (await lucid("payouts", "--from", "yesterday")).status == 2
