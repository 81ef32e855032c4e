"""Builds the responses of the payout routes from lines and losses, as JSON shapes and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime
from itertools import groupby

from fastapi import Response

from lucid_compute.accounting.payouts.losses import Loss, LossSummary
from lucid_compute.accounting.payouts.revenue import LossCause, ResponsibleParty, Role, Terms
from lucid_compute.accounting.payouts.shapes import (
    LossReport,
    LossView,
    PayoutLine,
    PayoutReport,
    PayoutTotal,
    PeriodView,
    SideTotal,
    TermsView,
)
from lucid_compute.accounting.payouts.store import Earnings, EarningsLine, Period
from lucid_compute.registry.domain.prices import total
from lucid_compute.web.csv import write_csv
from lucid_compute.wire import write_money

_PAYOUT_TITLES = ["kind", "day", "owner", "role", "passportId", "node", "modelId", "model"]
_PAYOUT_TITLES += ["jobs", "tokensIn", "tokensOut", "grossUsd", "amountUsd", "periodId"]
_LOSS_TITLES = ["kind", "side", "cause", "requests", "retried", "refused", "unearnedUsd", "passedOnUsd", "unestimated"]


def view_report(
    sums: Earnings,
    terms: Iterable[tuple[datetime, Terms]],
    *,
    since: date,
    until: date,
    owner: str | None,
    period: PeriodView | None = None,
) -> PayoutReport:
    """Return what was earned, by owner and role, and by node and model."""
    return PayoutReport(
        from_=since,
        to=until,
        owner=owner,
        period=period,
        terms=[TermsView(since=at, **each._asdict()) for at, each in terms],
        totals=[_sums(line.owner, line.role, [line]) for line in sums.totals],
        lines=None if sums.lines is None else [_view_line(line) for line in sums.lines],
    )


def view_period(period: Period, *, shows_closer: bool) -> PeriodView:
    """Return a closed period."""
    return PeriodView(
        id=period.id,
        from_=period.starts_on,
        to=period.ends_on,
        closed_at=period.closed_at,
        created_at=period.closed_at,
        closed_by=period.closed_by if shows_closer else None,
    )


def write_statement(lines: Sequence[EarningsLine]) -> Response:
    """Return daily lines as CSV, and below them the total of each owner in each role: the exact sum of its lines."""
    rows: list[list[object]] = [
        [
            *("line", line.day, line.owner, line.role.value, line.node_id, line.node_name, line.model_id),
            *(line.model_name, line.jobs, line.tokens_in, line.tokens_out),
            *(write_money(line.gross_usd), write_money(line.amount_usd), line.period_id),
        ]
        for line in lines
    ]
    for each in _totals(lines):
        sums = (each.jobs, each.tokens_in, each.tokens_out, each.gross_usd, each.amount_usd)
        rows.append(["total", None, each.owner, each.role.value, None, None, None, None, *sums, None])
    return write_csv(_PAYOUT_TITLES, rows)


def view_losses(summary: LossSummary, *, since: date, until: date, owner: str | None) -> LossReport:
    """Return the losses by cause and by responsible party."""
    ordered = sorted(summary.by_cause.items(), key=lambda item: _lost_first(*item))
    return LossReport(
        from_=since,
        to=until,
        owner=owner,
        attempts=summary.attempts,
        completed=summary.completed,
        running=summary.running,
        losses=[_view_loss(cause, loss) for cause, loss in ordered],
        sides=[
            _view_party(party, [loss for cause, loss in ordered if cause.party is party]) for party in ResponsibleParty
        ],
    )


def write_losses(report: LossReport) -> Response:
    """Return losses as CSV, and below them the total of each responsible party."""
    rows = [
        [
            *("line" if isinstance(each, LossView) else "total", each.side.value),
            *(each.cause if isinstance(each, LossView) else None, each.requests, each.retried, each.refused),
            *(each.unearned_usd, each.passed_on_usd, each.unestimated),
        ]
        for each in [*report.losses, *report.sides]
    ]
    return write_csv(_LOSS_TITLES, rows)


def _view_line(line: EarningsLine) -> PayoutLine:
    return PayoutLine(
        **_sums(line.owner, line.role, [line]).model_dump(),
        passport_id=line.node_id,
        node=line.node_name,
        model_id=line.model_id or "",
        model=line.model_name,
    )


def _totals(lines: Iterable[EarningsLine]) -> list[PayoutTotal]:
    def owner_and_role(line: EarningsLine) -> tuple[str | None, Role]:
        return line.owner, line.role

    return [_sums(*key, [*each]) for key, each in groupby(lines, key=owner_and_role)]


def _sums(owner: str | None, role: Role, lines: Sequence[EarningsLine]) -> PayoutTotal:
    return PayoutTotal(
        owner=owner,
        role=role,
        jobs=sum(line.jobs for line in lines),
        tokens_in=sum(line.tokens_in for line in lines),
        tokens_out=sum(line.tokens_out for line in lines),
        gross_usd=write_money(total(line.gross_usd for line in lines)),
        amount_usd=write_money(total(line.amount_usd for line in lines)),
    )


def _lost_first(cause: LossCause, loss: Loss) -> tuple[int, int, LossCause]:
    return -loss.requests - loss.refused, -loss.retried, cause


def _view_loss(cause: LossCause, loss: Loss) -> LossView:
    return LossView(cause=cause.name, **_view_party(cause.party, [loss]).model_dump())


def _view_party(party: ResponsibleParty, losses: Sequence[Loss]) -> SideTotal:
    return SideTotal(
        side=party,
        requests=sum(loss.requests for loss in losses),
        retried=sum(loss.retried for loss in losses),
        refused=sum(loss.refused for loss in losses),
        unearned_usd=write_money(total(loss.unearned_usd for loss in losses)),
        passed_on_usd=write_money(total(loss.passed_on_usd for loss in losses)),
        unestimated=sum(loss.unestimated for loss in losses),
    )
