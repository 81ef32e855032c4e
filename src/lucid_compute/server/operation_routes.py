"""Routes for operators: liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from lucid_compute import __version__
from lucid_compute.compilation import FORM, PYTHON
from lucid_compute.errors import DatabaseUnavailable, Forbidden, Unauthorized
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import ADMINS, Anyone
from lucid_compute.server.dashboard.site import ADDRESS
from lucid_compute.server.metrics.metrics import ServiceMetrics
from lucid_compute.server.replica import Replica
from lucid_compute.server.settings import Settings
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.web.shapes import Liveness, Readiness

router = APIRouter(tags=["operations"])


@router.get("/", include_in_schema=False)
async def lead_to_dashboard(settings: Provided[Settings]) -> RedirectResponse:
    """Lead a browser to the dashboard."""
    return RedirectResponse(f"{settings.root_path}{ADDRESS}")


@router.get("/healthz", response_model=Liveness)
async def get_liveness() -> Liveness:
    """Say that the process runs."""
    return Liveness(status="ok")


@router.get("/readyz", response_model=Readiness, responses=declare(DatabaseUnavailable, key=False))
async def get_readiness(
    replica: Provided[Replica], feed: Provided[ChangeFeed], clock: Provided[DatabaseClock], fleet: Provided[Fleet]
) -> Readiness:
    """Say that the database answers, its schema is this version's, and the fleet is loaded; else 503."""
    await replica.require_ready()
    read_at = feed.read_at or clock.now()
    return Readiness(
        status="ready",
        nodes=fleet.node_count(),
        models=len(fleet.models_newest_first()),
        replicas=fleet.replicas.count(),
        feed_age_seconds=round(max((clock.now() - read_at).total_seconds(), 0.0), 3),
        version=__version__,
        python=PYTHON,
        compiled=FORM.is_compiled,
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **declare(Unauthorized, Forbidden, key=False),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"},
    },
)
async def get_metrics(request: Request, settings: Provided[Settings], caller: Anyone) -> Response:
    """Return what all workers behind this port count, for Prometheus: to admins, or to all if the operator says so."""
    if not settings.metrics_public:
        if caller is None:
            message = "Send an admin key: Authorization: Bearer lk_live_…, or set LUCID_METRICS_PUBLIC=true."
            raise Unauthorized(message)
        caller.require(ADMINS)
    from prometheus_client import CONTENT_TYPE_LATEST  # noqa: PLC0415 - as `ServiceMetrics.exposition` does

    metrics: ServiceMetrics = request.app.state.metrics
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
