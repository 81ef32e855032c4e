"""Routes for operators: liveness, readiness and metrics."""

from __future__ import annotations

import re
import time
from datetime import timedelta

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import SecretStr

from lucid_compute import __version__
from lucid_compute.compilation import FORM, PYTHON
from lucid_compute.errors import DatabaseUnavailable, Forbidden, Unauthorized
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import ADMINS, Admin, Anyone
from lucid_compute.server.dashboard.site import ADDRESS
from lucid_compute.server.metrics.metrics import ServiceMetrics
from lucid_compute.server.replica import Replica
from lucid_compute.server.settings import Settings
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.web.shapes import Liveness, Readiness, ReplicaView, ServiceView, SettingView

router = APIRouter(tags=["operations"])
HIDDEN = "(hidden)"
_USER = re.compile(r"//[^/@\s]+@")


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


@router.get("/service", response_model=ServiceView, responses=declare())
async def get_service(
    replica: Provided[Replica], feed: Provided[ChangeFeed], clock: Provided[DatabaseClock], _: Admin
) -> ServiceView:
    """Read what runs, for admins: the version, the live replicas, and the settings of the one that responds."""
    now, others = clock.now(), replica.fleet.replicas.others()
    own = ReplicaView(
        id=feed.replica_id,
        answers=True,
        started_at=now - timedelta(seconds=time.monotonic() - replica.made_at),
        seen_at=now,
        in_flight=sum(replica.fleet.replicas.own_in_flight.values()),
    )
    views = [
        ReplicaView(
            id=each.id,
            answers=False,
            started_at=each.started_at,
            seen_at=each.seen_at,
            in_flight=sum(each.in_flight.values()),
        )
        for each in others
    ]
    return ServiceView(
        version=__version__,
        python=PYTHON,
        compiled=FORM.is_compiled,
        replicas=[own, *sorted(views, key=lambda view: view.started_at)],
        settings=[_view_setting(replica.settings, name) for name in Settings.model_fields],
    )


def _view_setting(settings: Settings, name: str) -> SettingView:
    field, value = Settings.model_fields[name], getattr(settings, name)
    return SettingView(
        variable=f"LUCID_{name}".upper(),
        value=_written(value),
        is_default=value == field.default,
        meaning=field.description or "",
    )


def _written(value: object) -> str | None:
    """Return a setting's value as text; None when it is unset. Secrets, and users in URLs, are hidden."""
    if value is None or value == ():
        return None
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, tuple | list | frozenset):
        return ", ".join(str(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else _USER.sub(f"//{HIDDEN}@", str(value))


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
