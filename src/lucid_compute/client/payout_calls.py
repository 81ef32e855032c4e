"""Calls about payouts, losses and closed periods. Days are in UTC; a span does not include its last day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from lucid_compute.accounting.payouts.shapes import (
    CorrectionView,
    LossReport,
    PayoutReport,
    PeriodClose,
    PeriodCorrection,
    PeriodList,
    PeriodView,
)
from lucid_compute.client.call import ApiCall, PagedCall, body_of, checked_key, path_of, query_of

AnyDay = date | str


def get(*, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None) -> ApiCall[PayoutReport]:
    """Read the earnings of the jobs that started on these days, by default this month.

    You see your own; an admin sees those of everyone, or of `owner`.
    """
    query = query_of(**{"from": from_}, to=to, owner=owner)
    return ApiCall(method="GET", path="/payouts", query=query, answer=PayoutReport)


def statement(*, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None) -> ApiCall[str]:
    """Return the earnings per day as CSV, with the totals, which are the exact sums of the lines."""
    query = query_of(**{"from": from_}, to=to, owner=owner, format="csv")
    return ApiCall(method="GET", path="/payouts", query=query, answer=str)


def losses(
    *, from_: AnyDay | None = None, to: AnyDay | None = None, owner: str | None = None, model: str | None = None
) -> ApiCall[LossReport]:
    """Read what failed on your own nodes: cause, responsible party, estimated loss. An admin sees all nodes.

    It includes requests refused before a node was chosen: your own requests, and requests for your models.
    `model` (id, name or alias) leaves out those for other models.
    """
    query = query_of(**{"from": from_}, to=to, owner=owner, model=model)
    return ApiCall(method="GET", path="/payouts/losses", query=query, answer=LossReport)


def close_period(*, from_: AnyDay, to: AnyDay) -> ApiCall[PeriodView]:
    """Close a period, for admins; this is final. Sent again, it returns the closed period.

    Raises:
        Conflict: it does not begin where the last period ended; `details["from"]` is where that is.
    """
    body = body_of(PeriodClose, **{"from": from_}, to=to)
    return ApiCall(method="POST", path="/payouts/periods", body=body, answer=PeriodView)


def correct_period(
    period_id: str, *, reason: str, lines: Sequence[Mapping[str, object]], idempotency_key: str | None = None
) -> ApiCall[CorrectionView]:
    """Correct a closed period, for admins. The amounts are booked in the open period, and name the closed one.

    Each line has a `role`, its `owner` (none for the protocol) and `amountUsd`, a decimal string that may be below 0.
    The call carries an idempotency key, so a repetition after a lost response books nothing twice. Pass your own key to
    be safe across restarts too.
    """
    path = path_of("payouts", "periods", period_id, "corrections")
    body = body_of(PeriodCorrection, reason=reason, lines=lines)
    key = checked_key(idempotency_key)
    return ApiCall(method="POST", path=path, body=body, answer=CorrectionView, idempotency_key=key)


def periods(*, sort_by: str | None = None, sort_order: str | None = None) -> PagedCall[PeriodList, PeriodView]:
    """Iterate over the closed periods, latest first."""
    query = query_of(sort_by=sort_by, sort_order=sort_order)
    return PagedCall(path="/payouts/periods", query=query, answer=PeriodList, items=lambda page: page.periods)


def period(period_id: str, *, owner: str | None = None) -> ApiCall[PayoutReport]:
    """Read your own part of a closed period; an admin reads all of it. It never changes."""
    path = path_of("payouts", "periods", period_id)
    return ApiCall(method="GET", path=path, query=query_of(owner=owner), answer=PayoutReport)


def period_statement(period_id: str, *, owner: str | None = None) -> ApiCall[str]:
    """Return the earnings of a closed period per day as CSV."""
    path = path_of("payouts", "periods", period_id)
    return ApiCall(method="GET", path=path, query=query_of(owner=owner, format="csv"), answer=str)
