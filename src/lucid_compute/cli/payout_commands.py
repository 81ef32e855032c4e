"""`lucid payouts`: what was earned, statements, what was lost by whose fault, and closed periods."""

from __future__ import annotations

from datetime import date
from typing import Annotated

import typer

from lucid_compute.cli.command_groups import ListsByDefault
from lucid_compute.cli.confirmation import YesOption, confirm
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import refuse_both, write
from lucid_compute.cli.output import JsonOption, sentence, show, show_done, show_json
from lucid_compute.cli.payout_tables import loss_parts, payout_parts, period_table

app = typer.Typer(
    cls=ListsByDefault,
    help="What was earned, what was lost by whose fault, and closed periods.",
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
    """Show what was earned, by owner and role, and by model and node."""
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
    """Write a statement as CSV: a line for each day, node and model, and the totals that they add up to."""
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
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show what failed, by cause and by whose fault, and about what it would have earned."""
    with connected(api, key) as lucid:
        report = lucid.payouts.losses(from_=from_, to=to, owner=owner)
    if as_json:
        show_json(report)
    else:
        show(*loss_parts(report))


@app.command("periods")
def list_periods(as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """List the closed periods, the last one first."""
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
    """Close a period for good; for admins. It begins where the last one ended."""
    confirm(f"Close the payouts from {from_} until before {to} for good?", is_agreed=yes)
    with connected(api, key) as lucid:
        period = lucid.payouts.close_period(from_=from_, to=to)
    closed = f"The period from {period.from_} until before {period.to} is closed ({period.id})."
    show_done(closed, period, as_json=as_json)
