"""The loss ledger: what was not completed, the causes, the sides at fault, and what it would have earned.

Attempts are read from the job ledger in one snapshot, so that they add up to it exactly, and beside them the requests
that were refused before a node was asked. It reaches as far back as jobs are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal

from sqlalchemy import RowMapping, text

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.payouts.revenue import (
    Blame,
    Side,
    Typical,
    Unearned,
    blame,
    blame_refusal,
    could_be_served,
    estimate,
)
from lucid_compute.accounting.payouts.sql import ATTEMPTS, LOSSES, REFUSALS, TYPICAL
from lucid_compute.postgres.long_transactions import LongTransactions
from lucid_compute.registry.domain.prices import EXACT

_Typicals = dict[tuple[str | None, str], Typical]


@dataclass(slots=True)
class Loss:
    """What was lost by one cause: `requests` that failed, `retried` attempts that another one took the place of.

    `refused` requests were no attempt. `unearned_usd` is what requests would have earned, `passed_on_usd` what the
    retried attempts would have, here instead of elsewhere; `unestimated` is of how many of all nothing is known to
    estimate by.
    """

    requests: int = 0
    retried: int = 0
    refused: int = 0
    unearned_usd: Decimal = Decimal(0)
    passed_on_usd: Decimal = Decimal(0)
    unestimated: int = 0

    def add(self, jobs: int, worth: Decimal | None, *, is_last: bool) -> None:
        """Take in further attempts, with what they are estimated to be worth."""
        if is_last:
            self.requests += jobs
            self._miss(jobs, worth)
        else:
            self.retried += jobs
            if worth is None:
                self.unestimated += jobs
            else:
                self.passed_on_usd = EXACT.add(self.passed_on_usd, worth)

    def refuse(self, requests: int, worth: Decimal | None) -> None:
        """Take in further requests that no node was asked for."""
        self.refused += requests
        self._miss(requests, worth)

    def _miss(self, requests: int, worth: Decimal | None) -> None:
        if worth is None:
            self.unestimated += requests
        else:
            self.unearned_usd = EXACT.add(self.unearned_usd, worth)


@dataclass(frozen=True, slots=True)
class Losses:
    """All attempts of some days: `attempts` are those `completed`, those `running`, and those of `by_blame`.

    By blame stands also what was refused, which is no attempt.
    """

    attempts: int
    running: int
    by_blame: dict[Blame, Loss]

    @property
    def completed(self) -> int:
        """Return how many were completed."""
        return self.attempts - self.running - sum(loss.requests + loss.retried for loss in self.by_blame.values())


class LossReader:
    """Reads the loss ledger."""

    def __init__(self, transactions: LongTransactions) -> None:
        self._transactions = transactions

    async def read(self, since: date, until: date, *, owner: str | None) -> Losses:
        """Return what was lost of the jobs that started on these days on the owner's nodes; None is everybody's.

        And what was refused on these days of the requests of the owner, and of those for its models.
        """
        span = {"since": _midnight(since), "until": _midnight(until), "owner": owner}
        async with self._transactions.snapshot() as connection:
            attempts = await connection.scalar(text(ATTEMPTS), span)
            found = [*(await connection.execute(text(LOSSES), span)).mappings()]
            refused = [*(await connection.execute(text(REFUSALS), span)).mappings()]
            of = {
                "nodes": sorted({row["node_id"] for row in found} - {None}),
                "models": sorted({row["model_id"] for row in (*found, *refused)}),
            }
            known = [*(await connection.execute(text(TYPICAL), {**of, "since": since, "until": until})).mappings()]
        typical = _typical(known)
        losses = _add_up(int(attempts or 0), found, typical)
        _add_refused(losses, refused, typical)
        return losses


def _add_refused(losses: Losses, refused: Iterable[RowMapping], typical: _Typicals) -> None:
    for row in refused:
        cause, requests = blame_refusal(row["cause"]), row["requests"]
        worth = estimate(Unearned(requests, 0, 0, Decimal(0)), typical.get((None, row["model_id"])))
        if row["has_upstream"] or not could_be_served(cause.cause):
            worth = Decimal(0)
        losses.by_blame.setdefault(cause, Loss()).refuse(requests, worth)


def _add_up(attempts: int, found: Iterable[RowMapping], typical: _Typicals) -> Losses:
    running, by_blame = 0, dict[Blame, Loss]()
    for row in found:
        outcome, node_id, model_id = Outcome(row["outcome"]), row["node_id"], row["model_id"]
        if outcome is Outcome.RUNNING:
            running += row["jobs"]
            continue
        cause = blame(outcome, row["reason"])
        unearned = Unearned(row["jobs"], row["jobs_with_tokens"], row["tokens_in"], row["billed_usd"])
        worth = estimate(unearned, typical.get((node_id, model_id)) or typical.get((None, model_id)))
        if node_id is None or (outcome is Outcome.REJECTED and cause.side is Side.CLIENT):
            worth = Decimal(0)  # an upstream has no price, and what is wrong in itself could not be served
        by_blame.setdefault(cause, Loss()).add(row["jobs"], worth, is_last=row["is_last"])
    return Losses(attempts, running, by_blame)


def _typical(known: Iterable[RowMapping]) -> _Typicals:
    """Return what jobs typically come to, by node and model, and by model on all nodes, under None."""
    return {
        (row["node_id"], row["model_id"]): Typical(row["jobs"], row["tokens_in"], row["tokens_out"], row["gross_usd"])
        for row in known
    }


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time.min, UTC)
