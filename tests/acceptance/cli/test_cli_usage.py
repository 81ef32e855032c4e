"""`lucid usage`, `lucid keys create` with every limit, and `lucid jobs --consumer`, beside a real service."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway, chat_answer, open_gateway
from tests.lucid_serve import serving


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    """A service of the test's own."""
    with serving(database_url) as served:
        async with open_gateway(served) as opened:
            yield opened


async def edit_keys(admin: CommandLine) -> None:
    """Change the limits of a key and back, and give what can't be."""
    await admin("keys", "create", "edited", "--owner", "another", "--scope", "inference:run", "--concurrency", "4")
    changes = (
        "--requests-per-minute",
        "600",
        "--concurrency",
        "none",
        "--expires",
        "90d",
        "--model",
        "a",
        "--model",
        "b",
    )
    shown = (await admin("keys", "edit", "edited", *changes, "--budget", "2/day")).out
    assert "600/min, $2/day, models a b" in " ".join(shown.split())
    bare = ("--requests-per-minute", "none", "--budget", "none", "--any-model", "--expires", "never", "--name", "bare")
    edited = (await admin("keys", "edit", "edited", *bare, "--json")).json
    assert (edited["name"], edited["limits"], edited["expiresAt"], "key" in edited) == ("bare", None, None, False)
    for wrong in (
        (),
        ("--concurrency", "0"),
        ("--concurrency", "many"),
        ("--budget", "5"),
        ("--expires", "soon"),
        ("--model", "a", "--any-model"),
    ):
        refused = await admin("keys", "edit", "bare", *wrong)
        assert (refused.status, "Traceback" in refused.err) == (2, False), wrong


async def test_an_owner_sees_what_its_keys_have_used(gateway: Gateway, tmp_path: Path) -> None:
    """As a table, as CSV and as JSON; with the budgets of its keys."""
    admin = CommandLine(gateway.served.url, gateway.served.admin_key, tmp_path)
    limits = ("--concurrency", "4", "--budget", "20/month", "--model", "llama-*", "--model", "m")
    made = await admin("keys", "create", "ci", "--owner", "customer", "--scope", "inference:run", *limits)
    listed = (await admin("keys", "--owner", "customer", "--json")).json["keys"]
    key = next(each for each in listed if each["name"] == "ci")
    assert key["limits"]["models"] == ["llama-*", "m"]
    assert (key["limits"]["concurrency"], key["limits"]["budgetUsd"]) == (4, "20")
    assert "4 at once, $20/month, models llama-* m" in " ".join(
        (await admin("keys", "--owner", "customer")).out.split()
    )
    for wrong in ("20", "20/year", "/"):
        refused = await admin("keys", "create", "k", "--owner", "o", "--scope", "compute", "--budget", wrong)
        assert refused.status == 2, wrong
    await edit_keys(admin)
    consumer = CommandLine(gateway.served.url, made.out.strip(), tmp_path)
    empty = (await consumer("usage")).out
    assert "No requests of customer" in empty
    assert "20 a month" in empty
    async with FaultNode(Behaviour(answer=chat_answer(tokens_in=600, tokens_out=400))) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, pricePer1kTokens="0.5")
        await gateway.chat(model, messages=[{"role": "user", "content": "said" * 200}])
        await gateway.jobs(model)
    report = (await admin("usage", "--by", "owner", "--by", "model", "--json")).json
    (line,) = report["usage"]
    assert (line["model"], line["requests"], report["total"]["completed"]) == (model, 1, 1)
    shown = (await admin("usage", "--by", "model")).out
    assert model in shown
    assert line["priceUsd"] in shown
    assert "Total" in (await admin("usage")).out
    rows = list(csv.DictReader(io.StringIO((await admin("usage", "--csv", "--by", "key")).out)))
    assert [(row["requests"], row["priceUsd"]) for row in rows] == [("1", line["priceUsd"])]
    assert (await admin("usage", "--csv", "--json")).status == 2
    assert (await consumer("usage", "--owner", "rival")).status != 0
    assert model in (await admin("jobs", "--consumer", line["owner"])).out
    assert model not in (await consumer("jobs")).out
