"""`lucid usage`: what keys have used and what it cost, as tables or CSV."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from lucid_compute.accounting.jobs import UsageGroup
from lucid_compute.accounting.shapes import KeyBudget, UsageEntry, UsageReport, UsageTotal
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import refuse_both, write
from lucid_compute.cli.formatting import instant, number, or_unknown
from lucid_compute.cli.lookup import complete_key, complete_model, get_key
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_json

_GROUP_COLUMNS = {
    UsageGroup.DAY: Column("DAY"),
    UsageGroup.MODEL: Column("MODEL", shortest=12),
    UsageGroup.KEY: Column("KEY", shortest=12),
    UsageGroup.OWNER: Column("OWNER", shortest=8),
}
_SUM_COLUMNS = (
    Column("REQUESTS", right=True),
    Column("ERRORS", rank=2, right=True),
    Column("CANCELLED", rank=3, right=True),
    Column("TOKENS IN", rank=1, right=True),
    Column("TOKENS OUT", rank=1, right=True),
    Column("USD", right=True),
)
_BUDGET_COLUMNS = (Column("KEY", shortest=12), Column("BUDGET"), Column("SPENT", right=True), Column("FULL AGAIN"))
_MOMENT = "An RFC 3339 instant, a day such as 2026-01-31, or how long ago: -7d"


def usage(
    from_: Annotated[
        str | None, typer.Option("--from", metavar="WHEN", help=f"{_MOMENT}; this month's start if unset.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="WHEN", help=f"{_MOMENT}; now if unset.")] = None,
    by: Annotated[list[UsageGroup] | None, typer.Option(help="Add up by this; may be given again.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of this model: id or name.", autocompletion=complete_model)
    ] = None,
    key_id: Annotated[
        str | None,
        typer.Option(
            "--of-key", metavar="ID", help="Of this key: its id; its name for admins.", autocompletion=complete_key
        ),
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Another owner's; for admins.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show what your keys have used in the days of a span, and what it cost; by day if --by is unset."""
    refuse_both("--csv", as_csv, "--json", as_json)
    with connected(api, key) as lucid:
        found = key_id if key_id is None or _is_id(key_id) else get_key(lucid, key_id).id
        query: dict[str, Any] = {
            "from_": from_,
            "to": to,
            "group_by": by or [UsageGroup.DAY],
            "model": model,
            "key_id": found,
        }
        if as_csv:
            write(lucid.usage.csv(**query, owner=owner))
            return
        report = lucid.usage.get(**query, owner=owner)
    if as_json:
        show_json(report)
    else:
        show(*usage_parts(report))


def usage_parts(report: UsageReport) -> list[RenderableType]:
    """Return the lines, their sum, and the budgets of keys."""
    whose = f" of {report.owner}" if report.owner else ""
    if not report.total.requests:
        parts: list[RenderableType] = [sentence(f"No requests{whose} from {report.from_} until before {report.to}.")]
    else:
        columns = [_GROUP_COLUMNS[group] for group in report.group_by] or [Column("")]
        rows = (
            [(*(_group_cell(entry, group) for group in report.group_by), *_sums(entry)) for entry in report.usage]
            if report.group_by
            else []
        )
        blanks = [""] * (len(columns) - 1)
        parts = [
            sentence(f"Usage{whose} from {report.from_} until before {report.to}, in UTC and US dollars:"),
            Listing([*columns, *_SUM_COLUMNS], [*rows, ("Total", *blanks, *_sums(report.total))]),
        ]
    if report.budgets:
        parts += [sentence(""), sentence("Budgets:"), Listing(_BUDGET_COLUMNS, map(_budget, report.budgets))]
    return parts


def _group_cell(entry: UsageEntry, group: UsageGroup) -> str:
    if group is UsageGroup.DAY:
        return str(entry.day)
    if group is UsageGroup.MODEL:
        return entry.model or or_unknown(entry.model_id)
    if group is UsageGroup.KEY:
        return entry.key or or_unknown(entry.key_id)
    return or_unknown(entry.owner)


def _sums(sums: UsageTotal) -> tuple[str, ...]:
    return (
        number(sums.requests),
        number(sums.errors),
        number(sums.cancelled),
        number(sums.tokens_in),
        number(sums.tokens_out),
        sums.price_usd,
    )


def _budget(budget: KeyBudget) -> tuple[str, ...]:
    return budget.name, f"{budget.budget_usd} a {budget.budget_period}", budget.spent_usd, instant(budget.resets_at)


def _is_id(named: str) -> bool:
    """Return whether the text has the form of a key's id, so that no admin's key is needed to find it."""
    return len(named) == 12 and named.isalnum()  # noqa: PLR2004 - the length of ids
