"""`POST /compute/probe/{passportId}`: can the service reach the node?"""

from __future__ import annotations

from fastapi import APIRouter

from lucid_compute.errors import NodeDeregistered, NodeNotFound, Overloaded
from lucid_compute.gateway.prober import Prober
from lucid_compute.gateway.shapes import ProbeAnswer, TlsView
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.keys.dependencies import ComputeWriter
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided

router = APIRouter(prefix="/compute", tags=["compute"])


@router.post(
    "/probe/{passport_id}",
    response_model=ProbeAnswer,
    responses=declare(NodeNotFound, NodeDeregistered, Overloaded),
)
async def probe(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    prober: Provided[Prober],
    clock: Provided[DatabaseClock],
    principal: ComputeWriter,
) -> ProbeAnswer:
    """Go to the node's `inferenceUrl`, ask for `/v1/models`, and say what came of it; it changes nothing.

    It goes the way that requests go: each address is checked, redirects are not followed. A host is probed once in
    ten seconds; it takes 13 s at most.
    """
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    found = await prober.probe(node)
    tls = found.tls and TlsView(version=found.tls.version, certificate_expires_at=found.tls.certificate_expires_at)
    return ProbeAnswer(
        passport_id=passport_id,
        checked_at=clock.now(),
        reachable=found.is_reachable,
        code=found.code,
        message=found.message,
        http_status=found.http_status,
        connect_ms=found.connect_ms,
        answer_ms=found.answer_ms,
        tls=tls,
        runtime=found.runtime,
        models_listed=list(found.listed),
        models_missing=list(found.missing),
    )
