"""The calls about payouts, losses and closed periods. Days are those of UTC, and a span is without its last one."""

from __future__ import annotations

from datetime import date

from lucid_compute.client.call import ApiCall, PagedCall, body_of, path_of, query_of
from lucid_compute.wire.payouts import LossReport, PayoutReport, PeriodClose, PeriodList, PeriodView

AnyDay = date | str


def get(*, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None) -> ApiCall[PayoutReport]:
    """Read what was earned with the jobs that started on these days, this month unless asked otherwise.

    One's own; an admin's are everybody's, or those of `owner`.
    """
    query = query_of(**{"from": from_}, to=to, owner=owner)
    return ApiCall(method="GET", path="/payouts", query=query, answer=PayoutReport)


def statement(*, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None) -> ApiCall[str]:
    """Answer the same day by day as CSV, with the totals, which are the exact sums of the lines."""
    query = query_of(**{"from": from_}, to=to, owner=owner, format="csv")
    return ApiCall(method="GET", path="/payouts", query=query, answer=str)


def losses(*, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None) -> ApiCall[LossReport]:
    """Read what failed on one's own nodes, an admin's are all: by which cause, by whose fault, with an estimate.

    And what was refused before any node was asked, of one's own requests and of those for one's own models.
    """
    query = query_of(**{"from": from_}, to=to, owner=owner)
    return ApiCall(method="GET", path="/payouts/losses", query=query, answer=LossReport)


def close_period(*, from_: AnyDay, to: AnyDay) -> ApiCall[PeriodView]:
    """Close a period for good, for admins; sent again, it answers the one that is closed.

    Raises:
        Conflict: it does not begin where the last one ended; `details["from"]` says where that is.
    """
    body = body_of(PeriodClose, **{"from": from_}, to=to)
    return ApiCall(method="POST", path="/payouts/periods", body=body, answer=PeriodView)


def periods(*, sort_by: str | None = None, sort_order: str | None = None) -> PagedCall[PeriodList, PeriodView]:
    """Iterate over the closed periods, the last one first."""
    query = query_of(sort_by=sort_by, sort_order=sort_order)
    return PagedCall(path="/payouts/periods", query=query, answer=PeriodList, items=lambda page: page.periods)


def period(period_id: str, *, owner: str | None = None) -> ApiCall[PayoutReport]:
    """Read one's own part of a closed period, an admin's is everybody's; it is always the same."""
    path = path_of("payouts", "periods", period_id)
    return ApiCall(method="GET", path=path, query=query_of(owner=owner), answer=PayoutReport)


def period_statement(period_id: str, *, owner: str | None = None) -> ApiCall[str]:
    """Answer the same day by day as CSV."""
    path = path_of("payouts", "periods", period_id)
    return ApiCall(method="GET", path=path, query=query_of(owner=owner, format="csv"), answer=str)
