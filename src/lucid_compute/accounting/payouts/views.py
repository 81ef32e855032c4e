"""Builds the responses of the payout routes from lines and losses, as JSON shapes and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from operator import itemgetter

from fastapi import Response

from lucid_compute.accounting.payouts.closing import Period
from lucid_compute.accounting.payouts.corrections import Correction, CorrectionLine
from lucid_compute.accounting.payouts.losses import Loss, LossSummary
from lucid_compute.accounting.payouts.revenue import LossCause, ResponsibleParty, Role, Terms
from lucid_compute.accounting.payouts.shapes import (
    CorrectedLineView,
    CorrectionLineView,
    CorrectionView,
    LossReport,
    LossView,
    PayoutLine,
    PayoutReport,
    PayoutTotal,
    PeriodView,
    SideTotal,
    TermsView,
)
from lucid_compute.accounting.payouts.store import Earnings, EarningsLine, Statement
from lucid_compute.registry.domain.prices import total
from lucid_compute.web.csv import write_csv
from lucid_compute.wire import write_money

_ROLES = [*Role]
_PAYOUT_TITLES = ["kind", "day", "owner", "role", "passportId", "node", "modelId", "model"]
_PAYOUT_TITLES += ["jobs", "tokensIn", "tokensOut", "grossUsd", "amountUsd", "periodId", "correctsPeriodId", "reason"]
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
        totals=_totals(sums.totals, sums.corrections),
        lines=None if sums.lines is None else [_view_line(line) for line in sums.lines],
        corrections=[_view_correction(line) for line in sums.corrections],
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


def view_booked(correction: Correction) -> CorrectionView:
    """Return a correction as it was booked."""
    amounts = [
        CorrectedLineView(role=each.role, owner=each.owner, amount_usd=write_money(each.amount_usd))
        for each in correction.amounts
    ]
    fields = {name: value for name, value in correction._asdict().items() if name != "amounts"}
    return CorrectionView(**fields, lines=amounts)


class _Figure(Decimal):
    """An amount in CSV: a figure below 0 is no formula."""

    def __str__(self) -> str:
        return write_money(self)


def write_statement(statement: Statement) -> Response:
    """Return daily lines and corrections as CSV, and below them the exact total of each owner in each role."""
    rows: list[list[object]] = [
        [
            *("line", line.day, line.owner, line.role.value, line.node_id, line.node_name, line.model_id),
            *(line.model_name, line.jobs, line.tokens_in, line.tokens_out),
            *(_Figure(line.gross_usd), _Figure(line.amount_usd), line.period_id, None, None),
        ]
        for line in statement.lines
    ]
    for each in statement.corrections:
        nothing = [None] * 4 + [0, 0, 0, 0]
        amount = [_Figure(each.amount_usd), each.held_by, each.period_id, each.reason]
        rows.append(["correction", each.day, each.owner, each.role.value, *nothing, *amount])
    for party in _totals(statement.lines, statement.corrections):
        sums = (party.jobs, party.tokens_in, party.tokens_out, party.gross_usd, _Figure(party.amount_usd))
        rows.append(["total", None, party.owner, party.role.value, *[None] * 4, *sums, None, None, None])
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


def _view_correction(line: CorrectionLine) -> CorrectionLineView:
    fields = {name: value for name, value in line._asdict().items() if name != "held_by"}
    return CorrectionLineView(**{**fields, "amount_usd": write_money(line.amount_usd)})


def _totals(lines: Iterable[EarningsLine], corrections: Iterable[CorrectionLine]) -> list[PayoutTotal]:
    """Return the totals of each owner in each role: by owner with the protocol last, and by role."""
    by_party: dict[tuple[bool, str, int], tuple[list[EarningsLine], list[CorrectionLine]]] = {}
    for line in lines:
        by_party.setdefault(_party(line), ([], []))[0].append(line)
    for correction in corrections:
        by_party.setdefault(_party(correction), ([], []))[1].append(correction)
    return [
        _sums(None if is_protocol else owner, _ROLES[role], its_lines, its_corrections)
        for (is_protocol, owner, role), (its_lines, its_corrections) in sorted(by_party.items(), key=itemgetter(0))
    ]


def _party(line: EarningsLine | CorrectionLine) -> tuple[bool, str, int]:
    return line.owner is None, line.owner or "", _ROLES.index(line.role)


def _sums(
    owner: str | None, role: Role, lines: Sequence[EarningsLine], corrections: Sequence[CorrectionLine] = ()
) -> PayoutTotal:
    amounts = [each.amount_usd for each in lines] + [each.amount_usd for each in corrections]
    return PayoutTotal(
        owner=owner,
        role=role,
        jobs=sum(line.jobs for line in lines),
        tokens_in=sum(line.tokens_in for line in lines),
        tokens_out=sum(line.tokens_out for line in lines),
        gross_usd=write_money(total(line.gross_usd for line in lines)),
        amount_usd=write_money(total(amounts)),
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
