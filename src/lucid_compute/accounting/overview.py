"""The overview of the fleet and its route. Overviews are cached for a second, or until the fleet changes."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from lucid_compute.accounting.measured import SpanMetrics
from lucid_compute.accounting.rollup_reader import RollupQuery, RollupReader
from lucid_compute.accounting.series import figures_of
from lucid_compute.accounting.shapes import HourTotals, ModelCounts, NodeCounts, OutageView, Overview
from lucid_compute.accounting.timeline import STEPS, Timeline
from lucid_compute.errors import DatabaseUnavailable, Forbidden
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.domain.node_state import FRESH_WINDOW, NodeStatus
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.replicas import OUTAGE_AFTER
from lucid_compute.registry.keys.dependencies import Reader
from lucid_compute.registry.variants import is_available, is_served
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.web.turns import in_batches
from lucid_compute.wire import Text

CACHE_SECONDS = 1.0
_NODES_A_TURN = 2000
_TOTALS = {
    "requests": "requests",
    "completed": "completed",
    "failed": "failed",
    "error_rate": "errorRate",
    "latency_p50_ms": "latencyP50Ms",
    "latency_p95_ms": "latencyP95Ms",
    "tokens_in": "tokensIn",
    "tokens_out": "tokensOut",
    "revenue_usd": "revenueUsd",
}


@dataclass(slots=True)
class RenderedOverview:
    """The JSON of an overview, and its ETag."""

    body: bytes
    etag: str


@dataclass(slots=True)
class _Entry:
    """The cached overview of one owner, or the task that computes it."""

    task: asyncio.Task[RenderedOverview]
    changes: int
    done_at: float | None = None

    def is_current(self, changes: int, at: float) -> bool:
        """Return whether a request may get this overview at `at`, when the fleet has this number of changes."""
        return self.changes == changes and (self.done_at is None or at - self.done_at < CACHE_SECONDS)


class OverviewCache:
    """Caches the overviews of the last second by owner, so that many open dashboards cost one computation."""

    def __init__(self, fleet: Fleet, clock: DatabaseClock, rollups: RollupReader) -> None:
        self._fleet, self._clock, self._rollups = fleet, clock, rollups
        self._entries: dict[str | None, _Entry] = {}

    async def get(self, owner: str | None) -> RenderedOverview:
        """Return an owner's overview, or everyone's for None: at most a second old, and never older than a change."""
        at, changes = asyncio.get_running_loop().time(), self._fleet.changes
        entry = self._entries.get(owner)
        if entry is None or not entry.is_current(changes, at):
            self._evict(at)
            entry = self._entries[owner] = _Entry(asyncio.create_task(self._render(owner)), changes)
            entry.task.add_done_callback(lambda _: self._finish(owner, entry))
        return await asyncio.shield(entry.task)

    def _finish(self, owner: str | None, entry: _Entry) -> None:
        """Start the time of an entry. A failed one is dropped: the next request tries again."""
        entry.done_at = asyncio.get_running_loop().time()
        if (entry.task.cancelled() or entry.task.exception()) and self._entries.get(owner) is entry:
            del self._entries[owner]

    def _evict(self, at: float) -> None:
        old = [owner for owner, entry in self._entries.items() if entry.done_at and at - entry.done_at >= CACHE_SECONDS]
        for owner in old:
            del self._entries[owner]

    async def _render(self, owner: str | None) -> RenderedOverview:
        body = (await self._view(owner)).model_dump_json().encode()
        return RenderedOverview(body, f'W/"{hashlib.sha256(body).hexdigest()[:24]}"')

    async def _view(self, owner: str | None) -> Overview:
        now, fleet = self._clock.now(), self._fleet
        nodes = [node for node in fleet.nodes(owner=owner) if not node.record.has_ended]
        recent = [outage for outage in reversed(fleet.outages) if outage.ended_at > now - timedelta(days=1)]
        renewed_at = fleet.lease_renewed_at
        return Overview(
            owner=owner,
            nodes=await _count_nodes(fleet, nodes, now),
            models=_count_models(fleet, now),
            in_flight=sum(fleet.in_flight(node.state.id) for node in nodes),
            replicas=fleet.replicas.count(),
            last_hour=await _read_last_hour(self._rollups, owner, now),
            outage_since=renewed_at if renewed_at is not None and now - renewed_at > OUTAGE_AFTER else None,
            outages=[OutageView(started_at=outage.started_at, ended_at=outage.ended_at) for outage in recent],
        )


async def _count_nodes(fleet: Fleet, nodes: list[FleetNode], now: datetime) -> NodeCounts:
    """Count nodes by their status, in batches, so that other requests run in between."""
    live_since, fresh_since = fleet.live_since(now), now - FRESH_WINDOW
    found: Counter[NodeStatus] = Counter()
    fresh = 0
    async for batch in in_batches(nodes, _NODES_A_TURN):
        states = [node.state for node in batch]
        found.update(state.status(live_since) for state in states)
        fresh += sum(
            state.last_heartbeat is not None and state.last_heartbeat.received_at >= fresh_since for state in states
        )
    return NodeCounts(
        total=len(nodes),
        healthy=found[NodeStatus.HEALTHY],
        unhealthy=found[NodeStatus.UNHEALTHY],
        draining=found[NodeStatus.DRAINING],
        fresh=fresh,
    )


def _count_models(fleet: Fleet, now: datetime) -> ModelCounts:
    models = fleet.models_newest_first()
    return ModelCounts(
        total=len(models),
        available=sum(is_available(fleet, model, now) for model in models),
        served=sum(is_served(fleet, model, now) for model in models),
    )


async def _read_last_hour(rollups: RollupReader, owner: str | None, now: datetime) -> HourTotals | None:
    timeline = Timeline.around(now - timedelta(hours=1), now, STEPS["1m"])
    try:
        steps = await rollups.measure_jobs(RollupQuery(owner=owner), timeline, now=now)
    except DatabaseUnavailable:
        return None
    whole = SpanMetrics()
    for step in steps:
        whole.add(step)
    figures = figures_of(tuple(_TOTALS.values()), whole)
    return HourTotals.model_validate({field: figures[series] for field, series in _TOTALS.items()})


router = APIRouter(prefix="/compute", tags=["metrics"])
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since the ETag in If-None-Match"}}


@router.get("/overview", response_model=Overview, responses={**declare(), **_UNCHANGED})
async def get_overview(
    cache: Provided[OverviewCache],
    principal: Reader,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    known: Annotated[str | None, Header(alias="If-None-Match", include_in_schema=False)] = None,
) -> Response:
    """Read the state of the fleet now: your nodes, or all nodes for an admin, and all models.

    It is computed once a second at most, and again at once when a node or a model changes. The response has an ETag:
    sent back as `If-None-Match`, it gives 304 while nothing has changed.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden("Only an admin may look at another owner's nodes. Leave owner out.")
    overview = await cache.get(owner or principal.visible_owner)
    headers = {"ETag": overview.etag, "Cache-Control": "no-store"}
    if known == overview.etag:
        return Response(status_code=304, headers=headers)
    return Response(overview.body, media_type="application/json", headers=headers)
