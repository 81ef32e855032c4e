"""`GET /compute/connect`: an agent opens the connection through which its node is sent requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from lucid_compute.errors import InvalidRequest
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.keys.dependencies import ComputeWriter
from lucid_compute.registry.tunnel_watch import TunnelWatch
from lucid_compute.tunnel.tunnels import TunnelGrant, Tunnels
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Identifier, Label

PATH = "/compute/connect"
UPGRADE = "lucid.upgrade"
"""In `scope["extensions"]` of a request for a WebSocket: call it with the tunnels and the grant."""

Upgrade = Callable[[Tunnels, TunnelGrant], None]
_SWITCHING_PROTOCOLS = 101
router = APIRouter(tags=["compute"])


class _Upgraded(Response):
    """The end of a request whose connection is no longer HTTP: the server has answered it."""

    def __init__(self, upgrade: Upgrade, tunnels: Tunnels, grant: TunnelGrant) -> None:
        super().__init__(status_code=_SWITCHING_PROTOCOLS)
        self._upgrade, self._tunnels, self._grant = upgrade, tunnels, grant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI asks
        """Change the protocol. What is sent after that only tells the middlewares of it."""
        self._upgrade(self._tunnels, self._grant)
        await send({"type": "http.response.start", "status": self.status_code, "headers": []})


@router.get(
    PATH,
    status_code=_SWITCHING_PROTOCOLS,
    response_class=Response,
    response_model=None,
    include_in_schema=False,  # OpenAPI describes no WebSocket
)
async def connect(
    request: Request,
    registry: Provided[ComputeRegistry],
    watch: Provided[TunnelWatch],
    principal: ComputeWriter,
    passport_id: Annotated[Identifier, Query(alias="passportId", description="The outbound node.")],
    boot_id: Annotated[Label, Query(alias="bootId", description="That of the node's newest heartbeat.")],
) -> Response:
    """Open a WebSocket through which this replica sends the node its requests, as `lucid agent run --outbound` does.

    The protocol of its messages is the agent's and may change with the service's version.
    """
    await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    grant = TunnelGrant(passport_id, boot_id, principal.key_id)
    await watch.require(grant)
    upgrade: Upgrade | None = request.scope.get("extensions", {}).get(UPGRADE)
    if upgrade is None:
        message = "This path takes WebSockets, of a service that lucid serve runs: connect with lucid agent run."
        raise InvalidRequest.at("", message)
    return _Upgraded(upgrade, watch.tunnels, grant)
