"""The payout routes: what owners have earned, closed periods, and losses with who is responsible."""

from __future__ import annotations

from datetime import date, timedelta
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from lucid_compute.accounting.payouts.corrections import CorrectedAmount, NewCorrection
from lucid_compute.accounting.payouts.revenue import Role
from lucid_compute.accounting.payouts.shapes import (
    CorrectionView,
    LossReport,
    PayoutReport,
    PeriodClose,
    PeriodCorrection,
    PeriodList,
    PeriodView,
)
from lucid_compute.accounting.payouts.store import Days, PayoutStore
from lucid_compute.accounting.payouts.views import (
    view_booked,
    view_losses,
    view_period,
    view_report,
    write_losses,
    write_statement,
)
from lucid_compute.accounting.series_routes import known_model_id
from lucid_compute.errors import IdempotencyConflict, InvalidRequest, PeriodConflict, PeriodNotFound
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.idempotency import Idempotency
from lucid_compute.registry.keys.dependencies import ActorDependency, Admin, Reader, owner_of
from lucid_compute.web.csv import CSV_RESPONSE, CsvDependency
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Day, Text

router = APIRouter(prefix="/payouts", tags=["payouts"])
LOSSES_DAYS = 92
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="A repeat with the same key and body, whenever it comes, returns the correction that was booked.",
    ),
]
Owner = Annotated[Text | None, Query(description="Another owner than the key's; admins only.")]


async def get_days(
    clock: Provided[DatabaseClock],
    from_: Annotated[Day | None, Query(alias="from", description="The first day, in UTC; the month's if left out.")] = (
        None
    ),
    to: Annotated[Day | None, Query(description="The day after the last one; tomorrow if it is left out.")] = None,
) -> Days:
    """Return the requested days; by default this month up to today.

    Raises:
        InvalidRequest: the span has no day.
    """
    today = clock.now().date()
    return _days("query", from_ or today.replace(day=1), to or today + timedelta(days=1))


DaysDependency = Annotated[Days, Depends(get_days)]


@router.get("", response_model=PayoutReport, responses={**declare(), **CSV_RESPONSE})
async def get_payouts(
    payout_store: Provided[PayoutStore],
    principal: Reader,
    days: DaysDependency,
    is_csv: CsvDependency,
    owner: Owner = None,
) -> PayoutReport | Response:
    """Read what was earned with the jobs that started on these days, closed or not; an admin sees everyone's.

    The CSV is a statement: a line for each day, and totals that are the exact sums of the lines. A line adds up the
    jobs that `GET /compute/jobs` lists with a price for that node, model and day.
    """
    whose = owner_of(principal, owner, "payouts")
    if is_csv:
        return write_statement(await payout_store.daily(*days, owner=whose))
    sums, terms = await payout_store.sums(*days, owner=whose), await payout_store.terms(*days)
    return view_report(sums, terms, since=days.since, until=days.until, owner=whose)


@router.get("/losses", response_model=LossReport, responses={**declare(), **CSV_RESPONSE})
async def get_losses(
    payout_store: Provided[PayoutStore],
    principal: Reader,
    days: DaysDependency,
    is_csv: CsvDependency,
    fleet: Provided[Fleet],
    owner: Owner = None,
    model: Annotated[Text | None, Query(description="Of one model alone: its id, name or alias.")] = None,
) -> LossReport | Response:
    """Read which requests of these days on your nodes were not completed: by cause, and by who is responsible.

    A failed request counts once, by its last attempt. An attempt that was retried on another node counts as `retried`.
    A request that was refused before it reached a node counts as `refused`, if you sent it or it was for your model.
    This reaches as far back as jobs are kept.
    """
    whose = owner_of(principal, owner, "losses")
    if (days.until - days.since).days > LOSSES_DAYS:
        raise InvalidRequest.at("query.to", f"Send a span of {LOSSES_DAYS} days at most.")
    summary = await payout_store.losses.read(*days, owner=whose, model_id=known_model_id(fleet, model))
    report = view_losses(summary, since=days.since, until=days.until, owner=whose)
    return write_losses(report) if is_csv else report


@router.post(
    "/periods", status_code=201, response_model=PeriodView, responses={**declare(PeriodConflict, body=True), 200: {}}
)
async def close_period(
    body: PeriodClose, payout_store: Provided[PayoutStore], _: Admin, actor: ActorDependency, response: Response
) -> PeriodView:
    """Close a period, which is final. It begins where the last one ended. A repetition returns 200 and the same period.

    It holds what was billed before its end and is in no other period. What is billed later belongs to the next one.
    """
    days = _days("", body.from_, body.to)
    period, is_new = await payout_store.close(actor, *days)
    if not is_new:
        response.status_code = 200
    return view_period(period, shows_closer=True)


@router.post(
    "/periods/{period_id}/corrections",
    status_code=201,
    response_model=CorrectionView,
    responses=declare(PeriodNotFound, IdempotencyConflict, body=True),
)
async def correct_period(
    period_id: str,
    body: PeriodCorrection,
    request: Request,
    payout_store: Provided[PayoutStore],
    _: Admin,
    actor: ActorDependency,
    idempotency_key: IdempotencyKey = None,
) -> CorrectionView:
    """Correct a closed period. It stays as it is: the amounts are booked today, in the open period, and name it.

    They are in the reports and totals of the days and the period in which they are booked. They are written once; a
    further correction takes one back.
    """
    amounts = [CorrectedAmount(line.role, line.owner, line.amount_usd) for line in body.lines]
    for number, each in enumerate(amounts):
        if (each.owner is None) is not (each.role is Role.PROTOCOL):
            message = "Name the owner, and none for the protocol."
            raise InvalidRequest.at(f"lines.{number}.owner", message)
    digest = sha256(f"{period_id} ".encode() + await request.body()).digest()
    idempotency = Idempotency(idempotency_key, digest) if idempotency_key else None
    new = NewCorrection(period_id, body.reason, amounts)
    return view_booked(await payout_store.correct(actor, new, idempotency))


@router.get("/periods", response_model=PeriodList, responses=declare())
async def list_periods(
    payout_store: Provided[PayoutStore], principal: Reader, page: PageDependency, order: OrderDependency
) -> PeriodList:
    """List the closed periods. `name` sorts by their first day."""
    periods, total = await payout_store.list_periods(
        sort_by=order.by, sort_order=order.direction, offset=page.offset, limit=page.per_page
    )
    views = [view_period(period, shows_closer=principal.is_admin) for period in periods]
    return PeriodList(periods=views, pagination=page.pagination(total))


@router.get("/periods/{period_id}", response_model=PayoutReport, responses={**declare(PeriodNotFound), **CSV_RESPONSE})
async def get_period(
    period_id: str, payout_store: Provided[PayoutStore], principal: Reader, is_csv: CsvDependency, owner: Owner = None
) -> PayoutReport | Response:
    """Read your part of a closed period; an admin sees everyone's. It never changes, even when its jobs are deleted.

    A line with a day before the period is of jobs that were recorded after their own period had been closed.
    """
    whose = owner_of(principal, owner, "payouts")
    period = await payout_store.period(period_id)
    if is_csv:
        return write_statement(await payout_store.daily_of(period, owner=whose))
    since, until = period.starts_on, period.ends_on
    sums, terms = await payout_store.sums_of(period, owner=whose), await payout_store.terms(since, until)
    view = view_period(period, shows_closer=principal.is_admin)
    return view_report(sums, terms, since=since, until=until, owner=whose, period=view)


def _days(where: str, since: date, until: date) -> Days:
    if since >= until:
        message = f"There is no day from {since} to {until}: send the first day, and the day after the last one."
        raise InvalidRequest.at(f"{where}.to".lstrip("."), message)
    return Days(since, until)
