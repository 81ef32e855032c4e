"""The routes of metrics over time and uptime. Prometheus's `GET /metrics` is in `server/operation_routes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from lucid_compute.accounting.rollup_reader import RollupQuery, RollupReader
from lucid_compute.accounting.series import SERIES_NAMES
from lucid_compute.accounting.series_views import (
    WINDOW_LENGTHS,
    view_series,
    view_windows,
    write_series_csv,
    write_uptime_csv,
)
from lucid_compute.accounting.shapes import FleetUptime, NodeUptime, SeriesAnswer
from lucid_compute.accounting.timeline import MAX_POINTS, MOMENT, STEPS, Timeline, auto_step, read_moment
from lucid_compute.errors import InvalidRequest, NodeNotFound
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.queries import ids_are_uuids
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.domain.passports import Passport
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Reader, owner_of
from lucid_compute.registry.search import sorted_by
from lucid_compute.web.csv import CSV_RESPONSE, CsvDependency
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Text

Step = Literal["auto", "1m", "5m", "1h", "1d"]


@dataclass(frozen=True, slots=True)
class MetricsQuery:
    """The requested span, its steps, and the names of series."""

    since: str
    until: str | None
    step: Step
    series: tuple[str, ...]

    def timeline(self, now: datetime) -> Timeline:
        """Return the whole steps that cover the span.

        Raises:
            InvalidRequest: a moment can't be read, the span ends before it begins, or there would be too many steps.
        """
        since, until = read_moment("from", self.since, now), now
        if self.until is not None:
            until = read_moment("to", self.until, now)
        if until < since:
            message = "`to` lies before `from`, which is an hour ago when it is left out. Send one that is not earlier."
            raise InvalidRequest.at("query.to", message)
        step = auto_step(since, until) if self.step == "auto" else STEPS[self.step]
        if (until - since) // step >= MAX_POINTS:
            message = f"That is more than {MAX_POINTS} points. Take a longer step or a shorter span."
            raise InvalidRequest.at("query.step", message)
        try:
            return Timeline.around(since, until, step)
        except OverflowError:
            raise InvalidRequest.at(
                "query.to", "That step ends beyond the calendar. Send an earlier instant."
            ) from None


async def get_query(
    from_: Annotated[str, Query(alias="from", description=MOMENT)] = "-1h",
    to: Annotated[str | None, Query(description=f"{MOMENT} Now, when it is left out.")] = None,
    step: Annotated[Step, Query(description="`auto` takes the shortest that makes no more than 300 points.")] = "auto",
    series: Annotated[
        list[str] | None,
        Query(description=f"Names, separated by commas; all, when it is left out: {', '.join(SERIES_NAMES)}."),
    ] = None,
) -> MetricsQuery:
    """Return the query parameters of the metrics routes.

    Raises:
        InvalidRequest: a series does not exist.
    """
    return MetricsQuery(from_, to, step, _read_names(series))


MetricsQueryDependency = Annotated[MetricsQuery, Depends(get_query)]


def _read_names(series: Sequence[str] | None) -> tuple[str, ...]:
    if series is None:
        return SERIES_NAMES
    names = tuple(dict.fromkeys(name.strip() for entry in series for name in entry.split(",") if name.strip()))
    for name in names:
        if name not in SERIES_NAMES:
            raise InvalidRequest.at("query.series", f"There is no series {name!r}. GET /docs lists them.")
    return names or SERIES_NAMES


class UptimeTarget(NamedTuple):
    """The share of time, from 0 to 1, that nodes should be healthy. A request may name another one."""

    share: float


router = APIRouter(prefix="/compute", tags=["metrics"])
_UNKNOWN_MODEL = "00000000-0000-4000-8000-000000000000"
Model = Annotated[Text | None, Query(description="Count the jobs of one model alone: its id, name or alias.")]
Owner = Annotated[Text | None, Query(description="Another owner than the key's; admins only.")]
Target = Annotated[
    float | None,
    Query(gt=0, lt=1, allow_inf_nan=False, description="The share of time to be healthy; else `LUCID_UPTIME_TARGET`."),
]


@router.get("/metrics", response_model=SeriesAnswer, responses={**declare(), **CSV_RESPONSE})
async def get_fleet_metrics(
    clock: Provided[DatabaseClock],
    rollups: Provided[RollupReader],
    fleet: Provided[Fleet],
    principal: Reader,
    query: MetricsQueryDependency,
    is_csv: CsvDependency,
    model: Model = None,
    owner: Owner = None,
) -> SeriesAnswer | Response:
    """Read the metrics of all your nodes together; an admin sees all nodes and models' upstreams.

    Gauges are averages over the nodes' heartbeats, `…Max` is the highest value. A job counts in the minute in which it
    started, as soon as it has ended. So counts equal those of `GET /compute/jobs` for the same span.
    """
    rollup_query = RollupQuery(owner=owner_of(principal, owner, "metrics"), model_id=known_model_id(fleet, model))
    return await _read_series(clock, rollups, rollup_query, query, is_csv=is_csv)


@router.get("/metrics/{passport_id}", response_model=SeriesAnswer, responses={**declare(NodeNotFound), **CSV_RESPONSE})
async def get_node_metrics(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    clock: Provided[DatabaseClock],
    rollups: Provided[RollupReader],
    fleet: Provided[Fleet],
    principal: Reader,
    query: MetricsQueryDependency,
    is_csv: CsvDependency,
    model: Model = None,
) -> SeriesAnswer | Response:
    """Read the metrics of a node. Those of a deregistered node can be read for as long as they are kept."""
    node = await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    rollup_query = RollupQuery(node_id=node.id, model_id=known_model_id(fleet, model))
    return await _read_series(clock, rollups, rollup_query, query, is_csv=is_csv, node=node)


@router.get("/uptime", response_model=FleetUptime, responses={**declare(), **CSV_RESPONSE})
async def get_fleet_uptime(
    uptime_target: Provided[UptimeTarget],
    fleet: Provided[Fleet],
    rollups: Provided[RollupReader],
    clock: Provided[DatabaseClock],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    is_csv: CsvDependency,
    target: Target = None,
    owner: Owner = None,
) -> FleetUptime | Response:
    """Read the uptime of your nodes over 1, 7 and 30 days, with the rest of their error budgets.

    The CSV has the page of nodes alone.
    """
    whose, aim = owner_of(principal, owner, "metrics"), target or uptime_target.share
    nodes = [node for node in fleet.nodes(owner=whose) if not node.record.has_ended]
    shown = [node.record for node in page.slice_of(sorted_by(order, nodes))]
    uptimes = await _uptimes(clock, rollups, shown, aim)
    if is_csv:
        return write_uptime_csv(uptimes)
    together = await rollups.states(RollupQuery(owner=whose), WINDOW_LENGTHS, now=clock.now())
    return FleetUptime(
        owner=whose,
        target=aim,
        windows=view_windows(together, aim),
        nodes=uptimes,
        pagination=page.pagination(len(nodes)),
    )


@router.get("/uptime/{passport_id}", response_model=NodeUptime, responses={**declare(NodeNotFound), **CSV_RESPONSE})
async def get_node_uptime(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    uptime_target: Provided[UptimeTarget],
    clock: Provided[DatabaseClock],
    rollups: Provided[RollupReader],
    principal: Reader,
    is_csv: CsvDependency,
    target: Target = None,
) -> NodeUptime | Response:
    """Read a node's uptime over 1, 7 and 30 days, with the rest of its error budget.

    Uptime is healthy time divided by healthy and unhealthy time. Drains, outages of the registry, and the time before
    the first heartbeat do not count.
    """
    node = await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    (uptime,) = await _uptimes(clock, rollups, [node], target or uptime_target.share)
    return write_uptime_csv([uptime]) if is_csv else uptime


async def _read_series(
    clock: DatabaseClock,
    rollups: RollupReader,
    rollup_query: RollupQuery,
    query: MetricsQuery,
    *,
    is_csv: bool,
    node: Passport | None = None,
) -> SeriesAnswer | Response:
    now = clock.now()
    timeline = query.timeline(now)
    known_since = None if node is None else node.created_at
    metrics = await rollups.measure(rollup_query, timeline, now=now, known_since=known_since)
    owner = rollup_query.owner if node is None else node.owner
    series = view_series(
        timeline, metrics, query.series, passport_id=rollup_query.node_id, owner=owner, model=rollup_query.model_id
    )
    return write_series_csv(series) if is_csv else series


async def _uptimes(
    clock: DatabaseClock, rollups: RollupReader, nodes: list[Passport], target: float
) -> list[NodeUptime]:
    now = clock.now()
    found = await rollups.states_of_nodes([node.id for node in nodes], WINDOW_LENGTHS, now=now)
    return [
        NodeUptime(passport_id=node.id, name=node.name, target=target, windows=view_windows(found[node.id], target))
        for node in nodes
    ]


def known_model_id(fleet: Fleet, model: str | None) -> str | None:
    """Return the model's id; an unused id when there is no such model, so that nothing is counted."""
    if model is None:
        return None
    known = fleet.find_model(model)
    if known is not None:
        return known.id
    return model if ids_are_uuids(model) and UUID(model).int else _UNKNOWN_MODEL  # 0 stands for all models together
