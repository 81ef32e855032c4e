"""The ASGI application of one replica: FastAPI's routes, and the lanes of heartbeats and inference before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import lucid_compute
from lucid_compute.accounting import job_routes, overview, series_routes, usage_routes
from lucid_compute.accounting.payouts import routes as payout_routes
from lucid_compute.gateway import match_routes, openai_routes, probe_routes
from lucid_compute.gateway.endpoints import PATHS, find_stored
from lucid_compute.gateway.lane import InferenceLane
from lucid_compute.registry import heartbeat_lane, model_routes, node_routes, passport_routes, tunnel_routes
from lucid_compute.registry.heartbeat_lane import HeartbeatLane
from lucid_compute.registry.keys import routes as key_routes
from lucid_compute.registry.keys.authentication import authorization_of
from lucid_compute.server import openapi, operation_routes, reference_routes
from lucid_compute.server.asgi_client import AsgiClient
from lucid_compute.server.cors import Cors
from lucid_compute.server.dashboard import routes as dashboard_routes
from lucid_compute.server.dashboard.site import site_below
from lucid_compute.server.metrics.http_middleware import HttpMetricsMiddleware
from lucid_compute.server.metrics.metrics import ServiceMetrics
from lucid_compute.server.metrics.shared_memory import SharedSlots, WorkerSlot
from lucid_compute.server.replica import Replica, running
from lucid_compute.server.settings import MIB, Settings
from lucid_compute.server.wiring import build_replica
from lucid_compute.web import errors
from lucid_compute.web.bodies import BodyRoom
from lucid_compute.web.errors import has_route
from lucid_compute.web.lanes import Lane, Lanes
from lucid_compute.web.provide import provide
from lucid_compute.web.request_guard import RequestGuard
from lucid_compute.webhooks import routes as webhook_routes

LANES = "lucid.lanes"  # in the lifespan's state: the lanes to which a server may offer requests, by path
_DESCRIPTION = """\
GPU owners register a node, their node sends heartbeats, declares its models, drains and leaves. Everyone can ask which
models can be served right now, and why one can't.

Send a key as `Authorization: Bearer lk_live_…`. Every error has the shape
`{"error": {"code", "message", "status", "details"}}`; its message says what to do.
"""
_ROUTES = (
    passport_routes,
    node_routes,
    tunnel_routes,
    overview,
    probe_routes,
    job_routes,
    usage_routes,
    series_routes,
    payout_routes,
    model_routes,
    openai_routes,
    match_routes,
    key_routes,
    webhook_routes,
    operation_routes,
    reference_routes,
    dashboard_routes,
)


class LucidApp:
    """The complete application: the lanes serve a few paths, FastAPI all others. Its lifespan builds the replica."""

    heartbeats: HeartbeatLane
    inference: InferenceLane

    def __init__(
        self, settings: Settings, database_url: str, slot: WorkerSlot, build: Callable[[Settings, str], Replica]
    ) -> None:
        self._settings = settings
        self._database_url = database_url
        self._slot = slot
        self._build_replica = build
        self._room = BodyRoom(settings.request_bodies_max_mib * MIB)
        self._app: ASGIApp = Cors(self._route, settings.cors_origins) if settings.cors_origins else self._route
        self._lanes: dict[bytes, Lane] = {}
        self.fastapi = self._build_fastapi()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or run the lifespan."""
        await self._app(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        root = self._settings.root_path
        if root and path.startswith(f"{root}/"):  # a proxy may also have taken it off
            path = path[len(root) :]
            scope = {**scope, "path": path, "raw_path": path.encode()}
        lane = self._lanes.get(path.encode())
        if lane is None and find_stored(path) is not None:
            lane = self.inference
        if lane is not None:
            await AsgiClient(scope, receive, send).serve(lane)
        elif path and scope["method"] == "HEAD":
            # A copy: the server has to know that the response has no body.
            await self.fastapi({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self.fastapi(scope, receive, send)

    async def _judge(self, scope: Scope) -> bool:
        """Return whether a route takes the request and may want its body.

        Raises:
            Unauthorized, RateLimited, DatabaseUnavailable: it has no valid key, which every route with a body wants.
        """
        if scope["method"] == "GET" or not has_route(scope):
            return False
        client, headers = scope.get("client"), dict(scope["headers"])
        authenticator = self.fastapi.state.replica.authenticator
        await authenticator.authenticate(authorization_of(scope, headers), client and client[0])
        return True

    def _build_fastapi(self) -> FastAPI:
        app = FastAPI(
            title="lucid-compute",
            summary="Compute registry for networks of GPU providers",
            description=_DESCRIPTION,
            version=lucid_compute.__version__,
            lifespan=self._lifespan,
            servers=[{"url": self._settings.root_path}] if self._settings.root_path else None,
            redirect_slashes=False,
            docs_url=None,
            redoc_url=None,
        )
        errors.install(app)
        openapi.install(app)
        for routes in _ROUTES:
            app.router.routes += routes.router.routes  # `include_router` would build each again at the first request
        if self._settings.help_dir is not None:
            app.mount(reference_routes.HELP, reference_routes.HelpSite(self._settings.help_dir))
        app.state.root_path = self._settings.root_path
        app.state.site = site_below(self._settings.root_path)
        app.add_middleware(RequestGuard, room=self._room, judge=self._judge)
        app.add_middleware(HttpMetricsMiddleware)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Lanes]]:
        replica = self._build_replica(self._settings, self._database_url)
        app.state.replica = replica
        provide(app, *replica.parts())
        self.heartbeats, self.inference = _build_lanes(replica, self._room)
        app.state.metrics = metrics = ServiceMetrics(replica, self.heartbeats, self.inference, self._slot)
        self._lanes = {path.encode(): self.inference for path in PATHS}
        self._lanes[heartbeat_lane.PATH.encode()] = self.heartbeats
        async with running(replica):
            writing = asyncio.create_task(metrics.run(), name="metrics")
            try:
                yield {LANES: self._lanes}
            finally:
                writing.cancel()
                self.inference.close()


def _without_body(send: Send) -> Send:
    """Return `send` for a response to HEAD: its body is left out."""

    async def send_head(message: Any) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def _build_lanes(replica: Replica, room: BodyRoom) -> tuple[HeartbeatLane, InferenceLane]:
    settings = replica.settings
    heartbeats = HeartbeatLane(
        replica.authenticator,
        replica.fleet,
        replica.clock,
        replica.registry,
        max_per_second=settings.heartbeat_max_per_second,
        room=room,
    )
    inference = InferenceLane(
        replica.authenticator,
        replica.feed,
        replica.rates,
        replica.gateway,
        budgets=replica.usage.budgets,
        watchdog=replica.watchdog,
        refusals=replica.refusals,
        max_running=settings.inference_max_concurrency,
        max_body_bytes=settings.inference_max_body_mib * MIB,
        room=room,
    )
    return heartbeats, inference


def create_app(
    settings: Settings,
    database_url: str,
    slot: WorkerSlot | None = None,
    *,
    build: Callable[[Settings, str], Replica] = build_replica,
) -> LucidApp:
    """Return the application of one replica on the database at `database_url`, which is migrated already.

    Other workers see its metrics in `slot`; without one it is the only worker.
    """
    return LucidApp(settings, database_url, slot or SharedSlots(1).of_worker(0), build)
