"""Calls about metrics over time and about uptime.

A moment is an instant, or a distance into the past as text: `-90m`, `-1h`, `-7d`, `-4w`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from lucid_compute.accounting.shapes import FleetUptime, NodeUptime, SeriesAnswer
from lucid_compute.client.call import ApiCall, PagedCall, path_of, query_of

Moment = datetime | str


def node(
    passport_id: str,
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    step: str | None = None,
    series: Sequence[str] | None = None,
    model: str | None = None,
) -> ApiCall[SeriesAnswer]:
    """Read the metrics of a node in steps, of the last hour by default.

    `step` is `1m`, `5m`, `1h` or `1d`; by default the span decides. `series` names the series to read; by default all.
    """
    query = query_of(**{"from": from_}, to=to, step=step, series=_joined(series), model=model)
    return ApiCall(method="GET", path=path_of("compute", "metrics", passport_id), query=query, answer=SeriesAnswer)


def node_csv(
    passport_id: str,
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    step: str | None = None,
    series: Sequence[str] | None = None,
    model: str | None = None,
) -> ApiCall[str]:
    """Return the same as CSV: a line for each step, a column for each series and each reason of failure."""
    return _as_csv(node(passport_id, from_=from_, to=to, step=step, series=series, model=model))


def fleet(
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    step: str | None = None,
    series: Sequence[str] | None = None,
    model: str | None = None,
    owner: str | None = None,
) -> ApiCall[SeriesAnswer]:
    """Read the metrics of all your own nodes together; an admin reads those of all nodes, or of `owner`."""
    query = query_of(**{"from": from_}, to=to, step=step, series=_joined(series), model=model, owner=owner)
    return ApiCall(method="GET", path="/compute/metrics", query=query, answer=SeriesAnswer)


def fleet_csv(
    *,
    from_: Moment | None = None,
    to: Moment | None = None,
    step: str | None = None,
    series: Sequence[str] | None = None,
    model: str | None = None,
    owner: str | None = None,
) -> ApiCall[str]:
    """Return the same as CSV."""
    return _as_csv(fleet(from_=from_, to=to, step=step, series=series, model=model, owner=owner))


def uptime(passport_id: str, *, target: float | None = None) -> ApiCall[NodeUptime]:
    """Read a node's uptime over 1, 7 and 30 days, and the rest of its error budget for `target` (0 to 1)."""
    path = path_of("compute", "uptime", passport_id)
    return ApiCall(method="GET", path=path, query=query_of(target=target), answer=NodeUptime)


def fleet_uptime(*, target: float | None = None, owner: str | None = None) -> ApiCall[FleetUptime]:
    """Read the uptime of all your own nodes together, in `windows`. `uptimes` iterates over the single nodes."""
    query = query_of(target=target, owner=owner, per_page=1)
    return ApiCall(method="GET", path="/compute/uptime", query=query, answer=FleetUptime)


def uptimes(
    *,
    target: float | None = None,
    owner: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[FleetUptime, NodeUptime]:
    """Iterate over the uptimes of your own nodes."""
    query = query_of(target=target, owner=owner, sort_by=sort_by, sort_order=sort_order)
    return PagedCall(
        path="/compute/uptime",
        query=query,
        answer=FleetUptime,
        items=lambda page: page.nodes,
        identity=lambda node: node.passport_id,
    )


def _joined(series: Sequence[str] | None) -> str | None:
    return None if series is None else ",".join(series)


def _as_csv(call: ApiCall[SeriesAnswer]) -> ApiCall[str]:
    return ApiCall(method=call.method, path=call.path, query=(*call.query, *query_of(format="csv")), answer=str)
