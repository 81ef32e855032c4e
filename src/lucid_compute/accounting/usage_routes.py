"""The route of usage: what an owner's keys have used, by day, model and key, as JSON or CSV."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response

from lucid_compute.accounting.job_routes import find_model_ids
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.jobs import UsageGroup
from lucid_compute.accounting.shapes import KeyBudget, UsageEntry, UsageReport, UsageTotal
from lucid_compute.accounting.timeline import MOMENT, read_moment
from lucid_compute.accounting.usage import UsageLine, UsageQuery, UsageReader, UsageSums
from lucid_compute.errors import InvalidRequest
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Inferrer, owner_of
from lucid_compute.web.csv import CSV_RESPONSE, CsvDependency, write_csv
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Text, write_money

MAX_DAYS = 731
_ONE_DAY = timedelta(days=1)
_GROUPS = ", ".join(f"`{group}`" for group in UsageGroup)
_HEADS = {
    UsageGroup.DAY: ("day",),
    UsageGroup.MODEL: ("modelId", "model"),
    UsageGroup.KEY: ("keyId", "key"),
    UsageGroup.OWNER: ("owner",),
}
_SUM_HEADS = ("requests", "completed", "errors", "cancelled", "tokensIn", "tokensOut", "priceUsd")
router = APIRouter(tags=["usage"])


@router.get("/usage", response_model=UsageReport, responses={**declare(), **CSV_RESPONSE})
async def get_usage(
    usage: Provided[UsageReader],
    job_search: Provided[JobSearch],
    fleet: Provided[Fleet],
    clock: Provided[DatabaseClock],
    principal: Inferrer,
    is_csv: CsvDependency,
    from_: Annotated[str | None, Query(alias="from", description=f"{MOMENT} The month's start if left out.")] = None,
    to: Annotated[str | None, Query(description=f"{MOMENT} Now, when it is left out.")] = None,
    group_by: Annotated[
        list[str] | None,
        Query(
            alias="groupBy", description=f"{_GROUPS}, separated by commas; `day` if left out. Empty: the total alone."
        ),
    ] = None,
    model: Annotated[Text | None, Query(description="The model's id, name or alias.")] = None,
    key_id: Annotated[Text | None, Query(alias="keyId", description="The key's id.")] = None,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
) -> UsageReport | Response:
    """Read what your keys have used; an admin sees everyone's. Days are in UTC; the span covers whole days.

    A request counts on the day on which it started, as soon as it has ended. What a request cost is the sum of the
    prices that `GET /compute/jobs?consumer=` lists. Requests that were refused before they reached a node cost nothing
    and are not counted.
    """
    whose, groups, now = owner_of(principal, owner, "usage"), _read_groups(group_by), clock.now()
    since, until = _read_days(from_, to, now)
    model_ids = None if model is None else await find_model_ids(fleet, job_search, model)
    lines, total = await usage.read(UsageQuery(since, until, whose, key_id, model_ids), groups)
    if is_csv:
        return _write_lines(lines, groups)
    return UsageReport(
        owner=whose,
        from_=since,
        to=until,
        group_by=groups,
        usage=[_view_line(line) for line in lines],
        total=UsageTotal(**_view_sums(total)),
        budgets=None if whose is None else await _view_budgets(usage, whose, now),
    )


def _read_groups(group_by: Sequence[str] | None) -> list[UsageGroup]:
    named = {name.strip() for entry in group_by or [UsageGroup.DAY] for name in entry.split(",") if name.strip()}
    if unknown := sorted(named.difference(UsageGroup)):
        raise InvalidRequest.at("query.groupBy", f"Usage can't be grouped by {unknown[0]!r}. Send some of {_GROUPS}.")
    return [group for group in UsageGroup if group in named]


def _read_days(from_: str | None, to: str | None, now: datetime) -> tuple[date, date]:
    """Return the days that the span touches: the first, and the day after the last."""
    since = now.replace(day=1) if from_ is None else read_moment("from", from_, now)
    until = now if to is None else read_moment("to", to, now)
    if until < since:
        raise InvalidRequest.at("query.to", "`to` lies before `from`, or before this month. Send a later one.")
    first, last = since.date(), (until - timedelta(microseconds=1)).date()
    days = (max(last, first) - first).days + 1
    if days > MAX_DAYS:
        raise InvalidRequest.at("query.to", f"Send a span of {MAX_DAYS} days at most. This one has {days:,}.")
    try:
        return first, first + days * _ONE_DAY
    except OverflowError:
        raise InvalidRequest.at("query.to", "That day is beyond the calendar. Send an earlier instant.") from None


async def _view_budgets(usage: UsageReader, owner: str, now: datetime) -> list[KeyBudget]:
    return [
        KeyBudget(
            key_id=budget.key_id,
            name=budget.name,
            budget_usd=budget.usd,
            budget_period=budget.period,
            spent_usd=write_money(budget.spent_usd),
            resets_at=budget.period.resets_at(now),
        )
        for budget in await usage.budgets(owner, now)
    ]


def _view_line(line: UsageLine) -> UsageEntry:
    return UsageEntry(
        day=line.day,
        model_id=line.model_id,
        model=line.model,
        key_id=line.key_id,
        key=line.key,
        owner=line.owner,
        **_view_sums(line.sums),
    )


def _view_sums(sums: UsageSums) -> dict[str, int | str]:
    return {
        "requests": sums.requests,
        "completed": sums.completed,
        "errors": sums.errors,
        "cancelled": sums.cancelled,
        "tokens_in": sums.tokens_in,
        "tokens_out": sums.tokens_out,
        "price_usd": write_money(sums.price_usd),
    }


def _write_lines(lines: Sequence[UsageLine], groups: Sequence[UsageGroup]) -> Response:
    heads = [head for group in groups for head in _HEADS[group]]
    views = [_view_line(line).model_dump(mode="json") for line in lines]
    return write_csv([*heads, *_SUM_HEADS], ([view[head] for head in (*heads, *_SUM_HEADS)] for view in views))
