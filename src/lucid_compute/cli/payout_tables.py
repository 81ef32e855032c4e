"""Payouts, losses and closed periods, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from lucid_compute.cli.output import Column, Listing, sentence
from lucid_compute.cli.plain_text import counted, instant, number, or_unknown
from lucid_compute.wire.payouts import LossReport, PayoutReport, PayoutTotal, PeriodView

TOTAL_COLUMNS = (
    Column("OWNER", shortest=12),
    Column("ROLE"),
    Column("JOBS", right=True),
    Column("TOKENS", rank=1, right=True),
    Column("CHARGED", rank=2, right=True),
    Column("USD", right=True),
)
LINE_COLUMNS = (
    Column("MODEL", shortest=12),
    Column("NODE", shortest=12),
    Column("ROLE", rank=1),
    Column("JOBS", right=True),
    Column("TOKENS", rank=2, right=True),
    Column("USD", right=True),
    Column("OWNER", rank=3),
)
LOSS_COLUMNS = (
    Column("CAUSE", shortest=12),
    Column("FAULT OF"),
    Column("REQUESTS", right=True),
    Column("RETRIED", rank=1, right=True),
    Column("REFUSED", right=True),
    Column("UNEARNED", right=True),
    Column("PASSED ON", rank=2, right=True),
)
PERIOD_COLUMNS = (Column("FROM"), Column("TO"), Column("CLOSED", rank=1), Column("ID"))


def payout_parts(report: PayoutReport) -> list[RenderableType]:
    """Answer the totals of owners and roles, and what they are made of."""
    if not report.totals:
        return [sentence(f"Nothing was earned from {report.from_} to {report.to}.")]
    parts: list[RenderableType] = [
        sentence(f"Earned from {report.from_} until before {report.to}, in US dollars:"),
        Listing(TOTAL_COLUMNS, map(_total, report.totals)),
        sentence(""),
    ]
    if report.lines is None:
        return [*parts, sentence("Name an owner to see its models and nodes: there are too many of all.")]
    rows = (
        (line.model, or_unknown(line.node), line.role, number(line.jobs), _tokens(line), line.amount_usd, _owner(line))
        for line in report.lines
    )
    return [*parts, sentence("By model and node:"), Listing(LINE_COLUMNS, rows)]


def loss_parts(report: LossReport) -> list[RenderableType]:
    """Answer what failed, by cause, and how it adds up to all attempts."""
    attempts = f"{counted(report.attempts, 'attempt')}: {report.completed:,} completed, {report.running:,} running"
    if not report.losses:
        return [sentence(f"{attempts}. Nothing was lost.")]
    rows = (
        (
            *(loss.cause, loss.side, number(loss.requests), number(loss.retried), number(loss.refused)),
            *(loss.unearned_usd, loss.passed_on_usd),
        )
        for loss in report.losses
    )
    failed = sum(loss.requests for loss in report.losses)
    retried = sum(loss.retried for loss in report.losses)
    unknown = sum(loss.unestimated for loss in report.losses)
    refused = sum(loss.refused for loss in report.losses)
    notes = [sentence(f"{attempts}, {counted(failed, 'request')} failed, {retried:,} tried again elsewhere.")]
    if refused:
        notes.append(sentence(f"{counted(refused, 'request')} refused before any node was asked."))
    if unknown:
        notes.append(sentence(f"Of {unknown:,} nothing is known to estimate by."))
    return [Listing(LOSS_COLUMNS, rows), sentence(""), *notes]


def period_table(periods: Iterable[PeriodView]) -> Listing:
    """Answer closed periods."""
    rows = ((str(each.from_), str(each.to), instant(each.closed_at), each.id) for each in periods)
    return Listing(PERIOD_COLUMNS, rows)


def _total(each: PayoutTotal) -> tuple[str, ...]:
    return _owner(each), each.role, number(each.jobs), _tokens(each), each.gross_usd, each.amount_usd


def _owner(each: PayoutTotal) -> str:
    return or_unknown(each.owner)


def _tokens(each: PayoutTotal) -> str:
    return f"{each.tokens_in:,}+{each.tokens_out:,}"
