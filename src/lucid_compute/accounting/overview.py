"""The fleet at a glance, counted once for all who look: once a second at most, and anew when the fleet changes."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from lucid_compute.accounting.measured import Measured
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
from lucid_compute.registry.matching_engine import has_available_compute, has_serving_compute
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.web.turns import in_batches
from lucid_compute.wire import Text

KEPT_SECONDS = 1.0
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
class Glance:
    """An overview as it is sent, and the ETag that names it."""

    body: bytes
    etag: str


@dataclass(slots=True)
class _Count:
    """One owner's overview, on its way or done."""

    task: asyncio.Task[Glance]
    changes: int
    done_at: float | None = None

    def holds(self, changes: int, at: float) -> bool:
        """Return whether it may be answered to one who asks now."""
        return self.changes == changes and (self.done_at is None or at - self.done_at < KEPT_SECONDS)


class Overviews:
    """The overviews of whoever looked during the last second: many tabs cost one count. One event loop owns it."""

    def __init__(self, fleet: Fleet, clock: DatabaseClock, records: RollupReader) -> None:
        self._fleet, self._clock, self._records = fleet, clock, records
        self._counts: dict[str | None, _Count] = {}

    async def get(self, owner: str | None) -> Glance:
        """Return an owner's overview, None is everyone's: a second old at most, and never older than a change."""
        at, changes = asyncio.get_running_loop().time(), self._fleet.changes
        count = self._counts.get(owner)
        if count is None or not count.holds(changes, at):
            self._forget_old(at)
            count = self._counts[owner] = _Count(asyncio.create_task(self._count(owner)), changes)
            count.task.add_done_callback(lambda _: self._note(owner, count))
        return await asyncio.shield(count.task)

    def _note(self, owner: str | None, count: _Count) -> None:
        """A count that failed is not kept: the next one who asks has it tried again."""
        count.done_at = asyncio.get_running_loop().time()
        if (count.task.cancelled() or count.task.exception()) and self._counts.get(owner) is count:
            del self._counts[owner]

    def _forget_old(self, at: float) -> None:
        done = [owner for owner, count in self._counts.items() if count.done_at and at - count.done_at >= KEPT_SECONDS]
        for owner in done:
            del self._counts[owner]

    async def _count(self, owner: str | None) -> Glance:
        body = (await self._view(owner)).model_dump_json().encode()
        return Glance(body, f'W/"{hashlib.sha256(body).hexdigest()[:24]}"')

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
            last_hour=await _read_last_hour(self._records, owner, now),
            outage_since=renewed_at if renewed_at is not None and now - renewed_at > OUTAGE_AFTER else None,
            outages=[OutageView(started_at=outage.started_at, ended_at=outage.ended_at) for outage in recent],
        )


async def _count_nodes(fleet: Fleet, nodes: list[FleetNode], now: datetime) -> NodeCounts:
    """Count nodes by their status; others are answered in between."""
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
        available=sum(has_available_compute(model, fleet.candidates(model, now), now) for model in models),
        served=sum(has_serving_compute(model, fleet.serving_candidates(model, now), now) for model in models),
    )


async def _read_last_hour(records: RollupReader, owner: str | None, now: datetime) -> HourTotals | None:
    timeline = Timeline.around(now - timedelta(hours=1), now, STEPS["1m"])
    try:
        steps = await records.measure_jobs(RollupQuery(owner=owner), timeline, now=now)
    except DatabaseUnavailable:
        return None
    whole = Measured()
    for step in steps:
        whole.add(step)
    figures = figures_of(tuple(_TOTALS.values()), whole)
    return HourTotals.model_validate({field: figures[series] for field, series in _TOTALS.items()})


router = APIRouter(prefix="/compute", tags=["metrics"])
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since the ETag in If-None-Match"}}


@router.get("/overview", response_model=Overview, responses={**declare(), **_UNCHANGED})
async def get_overview(
    overviews: Provided[Overviews],
    principal: Reader,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    known: Annotated[str | None, Header(alias="If-None-Match", include_in_schema=False)] = None,
) -> Response:
    """Read how the fleet is right now, in one small answer: one's own nodes, an admin's are all; and every model.

    It is counted once a second at most, however many ask, and at once when a node or a model changes. It carries an
    ETag: sent back as `If-None-Match`, it is answered 304 for as long as nothing has changed.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden("Only an admin may look at another owner's nodes. Leave owner out.")
    glance = await overviews.get(owner or principal.visible_owner)
    headers = {"ETag": glance.etag, "Cache-Control": "no-store"}
    if known == glance.etag:
        return Response(status_code=304, headers=headers)
    return Response(glance.body, media_type="application/json", headers=headers)
