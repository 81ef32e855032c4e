"""`lucid payouts`: earnings, statements, losses by responsible party, and closed periods."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Annotated

import typer
from rich.console import RenderableType

from lucid_compute.accounting.payouts.revenue import Role
from lucid_compute.accounting.payouts.shapes import LossReport, PayoutReport, PayoutTotal, PeriodView
from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import YesOption, confirm, refuse_both, write
from lucid_compute.cli.formatting import counted, instant, number, or_unknown
from lucid_compute.cli.lookup import complete_model
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_done, show_json

app = typer.Typer(
    cls=ListByDefault,
    help="See earnings, losses by responsible party, and closed periods.",
    epilog="`lucid payouts` alone is `lucid payouts list`, with the same options.",
)


def _read_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("Say a day in UTC, such as 2026-01-31.") from None


FromOption = Annotated[
    date | None, typer.Option("--from", parser=_read_day, metavar="DAY", help="The first day; the month's if unset.")
]
ToOption = Annotated[
    date | None,
    typer.Option("--to", parser=_read_day, metavar="DAY", help="The day after the last; tomorrow if unset."),
]
OwnerOption = Annotated[str | None, typer.Option(help="Another owner's; for admins.")]
PeriodOption = Annotated[str | None, typer.Option("--period", metavar="ID", help="A closed period, instead of days.")]


@app.command("list")
def list_payouts(
    from_: FromOption = None,
    to: ToOption = None,
    period: PeriodOption = None,
    owner: OwnerOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show earnings, by owner and role, and by model and node."""
    refuse_both("--period", period, "days with --from and --to", from_ or to)
    with connected(api, key) as lucid:
        payouts = lucid.payouts
        report = payouts.period(period, owner=owner) if period else payouts.get(from_=from_, to=to, owner=owner)
    if as_json:
        show_json(report)
    else:
        show(*payout_parts(report))


@app.command("statement")
def write_statement(
    from_: FromOption = None,
    to: ToOption = None,
    period: PeriodOption = None,
    owner: OwnerOption = None,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Write a statement as CSV: a line for each day, node and model, and the totals of these lines."""
    refuse_both("--period", period, "days with --from and --to", from_ or to)
    with connected(api, key) as lucid:
        payouts = lucid.payouts
        write(
            payouts.period_statement(period, owner=owner)
            if period
            else payouts.statement(from_=from_, to=to, owner=owner)
        )


@app.command("losses")
def show_losses(
    from_: FromOption = None,
    to: ToOption = None,
    owner: OwnerOption = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of this model: id or name.", autocompletion=complete_model)
    ] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show what failed, by cause and responsible party, and an estimate of the lost earnings."""
    with connected(api, key) as lucid:
        report = lucid.payouts.losses(from_=from_, to=to, owner=owner, model=model)
    if as_json:
        show_json(report)
    else:
        show(*loss_parts(report))


@app.command("periods")
def list_periods(as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """List the closed periods, latest first."""
    with connected(api, key) as lucid:
        periods = list(lucid.payouts.periods())
    if as_json:
        show_json({"periods": periods})
    else:
        show(period_table(periods) if periods else sentence("No period is closed yet."))


@app.command("close")
def close_period(
    from_: Annotated[date, typer.Option("--from", parser=_read_day, metavar="DAY", help="The first day, in UTC.")],
    to: Annotated[date, typer.Option("--to", parser=_read_day, metavar="DAY", help="The day after the last one.")],
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Close a period, for admins; this is final. It begins where the last one ended."""
    confirm(f"Close the payouts from {from_} until before {to} for good?", is_agreed=yes)
    with connected(api, key) as lucid:
        period = lucid.payouts.close_period(from_=from_, to=to)
    closed = f"The period from {period.from_} until before {period.to} is closed ({period.id})."
    show_done(closed, period, as_json=as_json)


@app.command("correct")
def correct_period(
    period: Annotated[str, typer.Argument(metavar="PERIOD", help="The id of the closed period.")],
    role: Annotated[Role, typer.Option(help="In which role the amount is owed.")],
    amount: Annotated[str, typer.Option(metavar="USD", help="How much more, such as 12.5; less: --amount=-12.5.")],
    reason: Annotated[str, typer.Option(help="Why: it is in the statements.")],
    owner: Annotated[str | None, typer.Option(help="Whose amount; leave it out for the protocol.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Repeated with the same key, the correction is booked once.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Correct a closed period, for admins. The amount is booked in the open period; a further one takes it back."""
    confirm(f"Book {amount} US dollars for {owner or 'the protocol'} as {role}, for good?", is_agreed=yes)
    line = {"role": role, **({} if owner is None else {"owner": owner}), "amountUsd": amount}
    with connected(api, key) as lucid:
        booked = lucid.payouts.correct_period(period, reason=reason, lines=[line], idempotency_key=idempotency_key)
    show_done(f"The correction is booked on {booked.day} ({booked.id}).", booked, as_json=as_json)


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
CORRECTION_COLUMNS = (
    Column("DAY"),
    Column("OWNER", shortest=12),
    Column("ROLE"),
    Column("USD", right=True),
    Column("REASON", shortest=12),
    Column("CORRECTS", rank=1),
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
    """Return the totals of owners and roles, and the lines that they consist of."""
    if not report.totals:
        return [sentence(f"Nothing was earned from {report.from_} to {report.to}.")]
    parts: list[RenderableType] = [
        sentence(f"Earned from {report.from_} until before {report.to}, in US dollars:"),
        Listing(TOTAL_COLUMNS, map(_total, report.totals)),
        sentence(""),
    ]
    if report.corrections:
        corrected = (
            (str(each.day), or_unknown(each.owner), each.role, each.amount_usd, each.reason, each.period_id)
            for each in report.corrections
        )
        parts += [
            sentence("Of it corrections of closed periods:"),
            Listing(CORRECTION_COLUMNS, corrected),
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
    """Return what failed, by cause, and the sum of all attempts."""
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
    """Return a table of closed periods."""
    rows = ((str(each.from_), str(each.to), instant(each.closed_at), each.id) for each in periods)
    return Listing(PERIOD_COLUMNS, rows)


def _total(each: PayoutTotal) -> tuple[str, ...]:
    return _owner(each), each.role, number(each.jobs), _tokens(each), each.gross_usd, each.amount_usd


def _owner(each: PayoutTotal) -> str:
    return or_unknown(each.owner)


def _tokens(each: PayoutTotal) -> str:
    return f"{each.tokens_in:,}+{each.tokens_out:,}"
