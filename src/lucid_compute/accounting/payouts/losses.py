"""The loss ledger: attempts that were not completed, their causes and responsible parties, and what they cost.

Attempts are read from the job ledger in one snapshot, so that they add up to it exactly. Requests that were refused
before they reached a node are read with them. It reaches as far back as jobs are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal

from sqlalchemy import RowMapping, text

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.payouts.revenue import (
    BilledTotals,
    LossCause,
    ResponsibleParty,
    UnfinishedJobs,
    cause_of,
    cause_of_refusal,
    could_be_served,
    estimate,
)
from lucid_compute.accounting.payouts.sql import ATTEMPTS, BILLED_TOTALS, LOSSES, REFUSALS
from lucid_compute.postgres.long_transactions import LongTransactions
from lucid_compute.registry.domain.prices import EXACT

_BilledByModel = dict[tuple[str | None, str], BilledTotals]


@dataclass(slots=True)
class Loss:
    """The losses by one cause: `requests` that failed, `retried` attempts that were repeated, and `refused` requests.

    `unearned_usd` estimates what the requests would have earned, `passed_on_usd` what the retried attempts would have
    earned on their node. `unestimated` is how many of all these have no estimate.
    """

    requests: int = 0
    retried: int = 0
    refused: int = 0
    unearned_usd: Decimal = Decimal(0)
    passed_on_usd: Decimal = Decimal(0)
    unestimated: int = 0

    def add(self, jobs: int, worth: Decimal | None, *, is_last: bool) -> None:
        """Add attempts that are estimated to be worth so many US dollars."""
        if is_last:
            self.requests += jobs
            self._add_unearned(jobs, worth)
        else:
            self.retried += jobs
            if worth is None:
                self.unestimated += jobs
            else:
                self.passed_on_usd = EXACT.add(self.passed_on_usd, worth)

    def add_refused(self, requests: int, worth: Decimal | None) -> None:
        """Add requests that were refused before they reached a node."""
        self.refused += requests
        self._add_unearned(requests, worth)

    def _add_unearned(self, requests: int, worth: Decimal | None) -> None:
        if worth is None:
            self.unestimated += requests
        else:
            self.unearned_usd = EXACT.add(self.unearned_usd, worth)


@dataclass(frozen=True, slots=True)
class LossSummary:
    """All attempts of some days: `attempts` is the sum of `completed`, `running` and the attempts of `by_cause`.

    `by_cause` also has refused requests, which are no attempts.
    """

    attempts: int
    running: int
    by_cause: dict[LossCause, Loss]

    @property
    def completed(self) -> int:
        """Return how many attempts were completed."""
        return self.attempts - self.running - sum(loss.requests + loss.retried for loss in self.by_cause.values())


class LossReader:
    """Reads the loss ledger."""

    def __init__(self, transactions: LongTransactions) -> None:
        self._transactions = transactions

    async def read(self, since: date, until: date, *, owner: str | None, model_id: str | None = None) -> LossSummary:
        """Return the losses of jobs that started on these days on the owner's nodes; None is everyone's.

        Refused requests of these days are included if the owner sent them or they were for its models.
        With `model_id` only requests for that model count.
        """
        span = {"since": _midnight(since), "until": _midnight(until), "owner": owner, "model": model_id}
        async with self._transactions.snapshot() as connection:
            attempts = await connection.scalar(text(ATTEMPTS), span)
            losses = [*(await connection.execute(text(LOSSES), span)).mappings()]
            refused = [*(await connection.execute(text(REFUSALS), span)).mappings()]
            ids = {
                "nodes": sorted({row["node_id"] for row in losses} - {None}),
                "models": sorted({row["model_id"] for row in (*losses, *refused)}),
            }
            rows = [
                *(await connection.execute(text(BILLED_TOTALS), {**ids, "since": since, "until": until})).mappings()
            ]
        billed = _read_billed_totals(rows)
        summary = _add_up(int(attempts or 0), losses, billed)
        _add_refused(summary, refused, billed)
        return summary


def _add_refused(summary: LossSummary, refused: Iterable[RowMapping], billed: _BilledByModel) -> None:
    for row in refused:
        cause, requests = cause_of_refusal(row["cause"]), row["requests"]
        worth = estimate(UnfinishedJobs(requests, 0, 0, Decimal(0)), billed.get((None, row["model_id"])))
        if row["has_upstream"] or not could_be_served(cause.name):
            worth = Decimal(0)
        summary.by_cause.setdefault(cause, Loss()).add_refused(requests, worth)


def _add_up(attempts: int, losses: Iterable[RowMapping], billed: _BilledByModel) -> LossSummary:
    running, by_cause = 0, dict[LossCause, Loss]()
    for row in losses:
        outcome, node_id, model_id = Outcome(row["outcome"]), row["node_id"], row["model_id"]
        if outcome is Outcome.RUNNING:
            running += row["jobs"]
            continue
        cause = cause_of(outcome, row["reason"])
        unfinished = UnfinishedJobs(row["jobs"], row["jobs_with_tokens"], row["tokens_in"], row["billed_usd"])
        worth = estimate(unfinished, billed.get((node_id, model_id)) or billed.get((None, model_id)))
        if node_id is None or (outcome is Outcome.REJECTED and cause.party is ResponsibleParty.CLIENT):
            worth = Decimal(0)  # upstreams have no price, and a request that is wrong could not be served
        by_cause.setdefault(cause, Loss()).add(row["jobs"], worth, is_last=row["is_last"])
    return LossSummary(attempts, running, by_cause)


def _read_billed_totals(rows: Iterable[RowMapping]) -> _BilledByModel:
    """Return the totals of billed jobs by node and model, and by model on all nodes under None."""
    return {
        (row["node_id"], row["model_id"]): BilledTotals(
            row["jobs"], row["tokens_in"], row["tokens_out"], row["gross_usd"]
        )
        for row in rows
    }


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time.min, UTC)
