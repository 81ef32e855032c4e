"""Routes about the way to one node: can the service reach it, and would it be sent a request?"""

from __future__ import annotations

from datetime import datetime, timedelta

from fastapi import APIRouter

from lucid_compute.errors import NodeDeregistered, NodeNotFound, Overloaded
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.gateway import Gateway
from lucid_compute.gateway.prober import Prober
from lucid_compute.gateway.ranking import rank
from lucid_compute.gateway.request import Criteria
from lucid_compute.gateway.shapes import ModelRouting, NodeRouting, ProbeAnswer, TlsView
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.keys.dependencies import ComputeWriter, Reader
from lucid_compute.registry.routing_rules import NO_POLICY, NodeUsage, routing_reasons
from lucid_compute.registry.views import view_reason
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided

MAX_MODELS = 5
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


@router.get("/routing/{passport_id}", response_model=NodeRouting, responses=declare(NodeNotFound, NodeDeregistered))
async def get_routing(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    fleet: Provided[Fleet],
    gateway: Provided[Gateway],
    clock: Provided[DatabaseClock],
    principal: Reader,
) -> NodeRouting:
    """Say whether the node would be sent a request now, for each of its registered models; nothing is sent.

    Breakers and waits are what this replica measured: another one may decide otherwise.
    """
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    now = clock.now()
    models, usage = [], NodeUsage()
    for model in _models_of(fleet, node):
        criteria = Criteria(model, NO_POLICY, owner=principal.owner)
        usage = gateway.dispatcher.usage_of(node, criteria)
        models.append(await _route(fleet, gateway.dispatcher, node, criteria, now))
    is_open = usage.blocked_seconds > 0
    return NodeRouting(
        passport_id=passport_id,
        checked_at=now,
        breaker_open_since=now - timedelta(seconds=usage.failing_seconds) if is_open else None,
        breaker_retry_at=now + timedelta(seconds=usage.blocked_seconds) if is_open else None,
        models=models,
    )


def _models_of(fleet: Fleet, node: FleetNode) -> list[ModelPassport]:
    """Return the registered models that the node declares or reports, each once."""
    receipt = node.state.last_heartbeat
    names = [*node.state.declared, *(receipt.heartbeat.available_models if receipt else ())]
    found = (fleet.find_model(name) for name in names)
    return list({model.id: model for model in found if model is not None}.values())[:MAX_MODELS]


async def _route(
    fleet: Fleet, dispatcher: Dispatcher, node: FleetNode, criteria: Criteria, now: datetime
) -> ModelRouting:
    model, usage = criteria.model, dispatcher.usage_of(node, criteria)
    reasons = routing_reasons(model, node.state, usage, NO_POLICY, now=now, live_since=fleet.live_since(now))
    shortlist = [] if reasons else (await rank(fleet, dispatcher, criteria, now)).shortlist
    place = next((place for place, ranked in enumerate(shortlist, 1) if ranked.node is node), None)
    return ModelRouting(
        model=model.record.name,
        model_passport_id=model.id,
        place=place,
        nodes=len(shortlist),
        wait_ms=None if reasons else round(dispatcher.wait_ms(node, criteria), 3),
        reasons=[view_reason(reason) for reason in reasons],
    )
