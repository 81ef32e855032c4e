"""The loss ledger: each failed request has one cause and one responsible party; with completed ones they add up."""

from __future__ import annotations

import csv
import io
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.payouts.losses import LossSummary
from tests.api import Api, error_code
from tests.integration.accounting.test_payouts import tell
from tests.ledger import all_written, ended, ledger_on, new_job

TODAY = datetime.now(UTC).date()
SPAN = {"from": str(TODAY - timedelta(days=2)), "to": str(TODAY + timedelta(days=2))}
ENDINGS: list[tuple[Outcome, str | None]] = [
    (Outcome.FAILED, "http_503"),
    (Outcome.FAILED, "connect_failed"),
    (Outcome.FAILED, "internal"),
    (Outcome.FAILED, None),
    (Outcome.CANCELLED, "client_left"),
    (Outcome.CANCELLED, "shutdown"),
    (Outcome.REJECTED, "http_400"),
    (Outcome.REJECTED, "endpoint_not_offered"),
]


async def losses(api: Api, **query: Any) -> dict[str, Any]:
    """The losses of the last days, whose sums have to be right."""
    answer = await api.http.get("/payouts/losses", params={**SPAN, **query})
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    for name in ("requests", "retried", "unestimated"):
        assert sum(each[name] for each in report["losses"]) == sum(each[name] for each in report["sides"])
    lost = sum(each["requests"] + each["retried"] for each in report["losses"])
    assert report["attempts"] == report["completed"] + report["running"] + lost
    return report


def a_request(chance: random.Random, nodes: dict[str, str]) -> list[Job]:
    """The attempts of one request, on any nodes; all but the last one failed."""
    count, request = chance.randint(1, 3), str(uuid4())
    attempts = []
    for number in range(1, count + 1):
        node = chance.choice(list(nodes))
        job = new_job(id=request, attempt=number, node_id=node, node_owner=nodes[node])
        if number < count:
            ended(job, Outcome.FAILED, reason="http_503", price_usd=None, tokens_in=None)
        elif chance.random() < 0.5:
            ended(job)
        else:
            outcome, reason = chance.choice(ENDINGS)
            ended(job, outcome, reason=reason, price_usd=None, tokens_in=None)
        attempts.append(job)
    return attempts


async def test_completed_running_failed_and_retried_are_exactly_all_attempts(api: Api) -> None:
    """For everybody and for each owner; a request that failed counts once, whoever was tried before."""
    chance = random.Random(11)
    nodes = {str(uuid4()): owner for owner in ("acme", "acme", "globex")}
    requests = [a_request(chance, nodes) for _ in range(200)]
    jobs = [job for request in requests for job in request]
    await tell(api, jobs)
    api.replica.jobs.begin(new_job(node_id=next(iter(nodes)), node_owner="acme"))
    await all_written(api.replica.jobs)
    report = await losses(api)
    assert report["running"] == 1
    assert report["completed"] == sum(job.outcome is Outcome.COMPLETED for job in jobs)
    failed = [request for request in requests if request[-1].outcome is not Outcome.COMPLETED]
    assert sum(each["requests"] for each in report["losses"]) == len(failed)
    for owner in (None, "acme", "globex"):
        its = await losses(api, **({"owner": owner} if owner else {}))
        listed = await api.http.get("/compute/jobs", params={"owner": owner} if owner else {})
        assert its["attempts"] == listed.json()["pagination"]["total"]
    by_cause = {each["cause"]: each for each in report["losses"]}
    sides = {
        ("http_503", "provider"),
        ("connect_failed", "provider"),
        ("internal", "us"),
        ("unknown", "provider"),
        ("client_left", "client"),
        ("shutdown", "us"),
        ("http_400", "client"),
        ("endpoint_not_offered", "provider"),
    }
    assert {(each["cause"], each["side"]) for each in report["losses"]} == sides
    assert by_cause["http_503"]["retried"] == sum(len(request) - 1 for request in requests)


async def test_all_that_is_counted_is_of_one_instant(api: Api) -> None:
    """While requests fail, none of them is ever taken for one that was served, or for one that never was."""
    async with ledger_on(api.replica.database.url) as ledger:
        for _ in range(60):
            for _ in range(20):
                ledger.finish(ended(new_job(), Outcome.FAILED, reason="http_500", price_usd=None))
            report = await losses(api)
            assert (report["completed"], report["running"]) == (0, 0)
        await all_written(ledger)
    assert (await losses(api))["attempts"] == 1200


async def test_a_loss_is_worth_what_such_a_request_typically_earns_there_and_what_was_billed_is_no_loss(
    api: Api,
) -> None:
    node, other, model = (str(uuid4()) for _ in range(3))

    def job(on: str, **changes: Any) -> Job:
        return new_job(node_id=on, node_owner="acme", model_id=model, **changes)

    completed = [ended(job(node), tokens_in=100, tokens_out=300, price_usd=Decimal("0.04")) for _ in range(10)]
    request = str(uuid4())
    lost = [
        ended(
            job(node, id=request), Outcome.FAILED, reason="http_500", tokens_in=None, tokens_out=None, price_usd=None
        ),
        ended(job(other, id=request, attempt=2), Outcome.FAILED, reason="http_500", tokens_in=None, price_usd=None),
        ended(job(other), Outcome.FAILED, reason="http_500", tokens_in=500, tokens_out=100, price_usd=Decimal("0.06")),
        ended(job(node), Outcome.REJECTED, reason="http_400", tokens_in=None, tokens_out=None, price_usd=None),
        ended(
            new_job(node_id=node, node_owner="acme"),
            Outcome.FAILED,
            reason="connect_failed",
            tokens_in=None,
            price_usd=None,
        ),
    ]
    await tell(api, completed)
    await tell(api, [each for each in lost if each is not lost[2]])
    report = await losses(api)
    found = {each["cause"]: each for each in report["losses"]}
    assert (found["http_500"]["requests"], found["http_500"]["retried"]) == (1, 1)
    assert Decimal(found["http_500"]["unearnedUsd"]) == Decimal(found["http_500"]["passedOnUsd"]) == Decimal("0.04")
    assert Decimal(found["http_400"]["unearnedUsd"]) == 0
    assert found["connect_failed"]["unestimated"] == 1
    await tell(api, [lost[2]])
    later = {each["cause"]: each for each in (await losses(api))["losses"]}
    assert later["http_500"]["requests"] == 2
    assert Decimal(later["http_500"]["unearnedUsd"]) > 0


async def test_losses_of_one_model_leave_out_those_of_others(api: Api) -> None:
    """Attempts, losses and refused requests alike; a model that there is not has none."""
    models = [await api.add_model(name) for name in ("one", "two")]
    jobs = [ended(new_job(model_id=model), Outcome.FAILED, reason="http_500", price_usd=None) for model in models]
    await tell(api, [*jobs, ended(new_job(model_id=models[0]))])
    api.replica.refusals.count("no_node", "acme", models[0])
    api.replica.refusals.count("no_node", "acme", models[1])
    await api.replica.refusals.flush()
    for name in (models[0], "one"):
        report = await losses(api, model=name)
        assert (report["attempts"], report["completed"]) == (2, 1)
        found = {each["cause"]: (each["requests"], each["refused"]) for each in report["losses"]}
        assert found == {"http_500": (1, 0), "no_node": (0, 1)}
    assert (await losses(api, model="three"))["losses"] == []
    assert (await losses(api))["attempts"] == 3


async def test_losses_of_a_replica_that_died_are_ours(api: Api) -> None:
    job = new_job(node_owner="acme")
    api.replica.jobs.begin(job)
    await all_written(api.replica.jobs)
    async with api.replica.database.transaction() as connection:
        await connection.exec_driver_sql("UPDATE jobs SET outcome = 'lost'")
    report = await losses(api)
    assert [(each["cause"], each["side"], each["requests"]) for each in report["losses"]] == [("replica_lost", "us", 1)]


async def test_an_owner_reads_its_own_losses_as_csv_too(api: Api) -> None:
    await tell(api, [ended(new_job(), Outcome.FAILED, reason="http_500", price_usd=None)])
    acme, globex = [await api.new_key(owner, ["compute"]) for owner in ("acme", "globex")]
    assert (await losses(globex))["attempts"] == 0
    answer = await acme.http.get("/payouts/losses", params={**SPAN, "format": "csv"})
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["side"], row["cause"], row["requests"]) for row in rows if row["kind"] == "line"] == [
        ("provider", "http_500", "1")
    ]
    assert {row["side"] for row in rows if row["kind"] == "total"} == {"provider", "network", "client", "us"}
    assert error_code(await acme.http.get("/payouts/losses", params={"owner": "globex"})) == "FORBIDDEN"


async def test_a_span_that_would_be_too_long_to_count_is_refused(api: Api) -> None:
    refused = await api.http.get("/payouts/losses", params={"from": "2020-01-01", "to": "2026-01-01"})
    assert error_code(refused) == "INVALID_REQUEST"


def test_nothing_is_lost_of_nothing() -> None:
    assert LossSummary(0, 0, {}).completed == 0
