"""Calls about usage: what an owner's keys have used and what it cost.

A moment is an instant, a day as text (`2026-01-31`), or a distance into the past: `-90m`, `-1h`, `-7d`, `-4w`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from lucid_compute.accounting.shapes import UsageReport
from lucid_compute.client.call import ApiCall, Query, query_of

Moment = datetime | str


def get(
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    group_by: Sequence[str] | None = None,
    model: str | None = None,
    key_id: str | None = None,
    owner: str | None = None,
) -> ApiCall[UsageReport]:
    """Read what your keys have used in the days of a span, by default this month; an admin reads everyone's.

    `group_by` has any of `day`, `model`, `key` and `owner`; by default it is the day. Without any there is the total.
    """
    query = _query(from_, to, group_by, model=model, key_id=key_id, owner=owner)
    return ApiCall(method="GET", path="/usage", query=query, answer=UsageReport)


def csv(
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    group_by: Sequence[str] | None = None,
    model: str | None = None,
    key_id: str | None = None,
    owner: str | None = None,
) -> ApiCall[str]:
    """Return the same as CSV, a line for each group."""
    query = (*_query(from_, to, group_by, model=model, key_id=key_id, owner=owner), *query_of(format="csv"))
    return ApiCall(method="GET", path="/usage", query=query, answer=str)


def _query(
    from_: Moment | None,
    to: Moment | None,
    group_by: Sequence[str] | None,
    *,
    model: str | None,
    key_id: str | None,
    owner: str | None,
) -> Query:
    groups = None if group_by is None else ",".join(group_by)
    return query_of(**{"from": from_}, to=to, group_by=groups, model=model, key_id=key_id, owner=owner)
