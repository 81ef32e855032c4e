"""`POST /match`: which node would serve a request, without one being sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from fastapi import APIRouter

from lucid_compute.errors import ModelNotAllowed, ModelNotFound
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.gateway import Gateway, draw_of
from lucid_compute.gateway.ranking import Ranked, rank
from lucid_compute.gateway.request import Criteria
from lucid_compute.gateway.request_body import policy_of
from lucid_compute.gateway.shapes import MatchAnswer, MatchRequest, RankedNode, RejectedNode
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.keys.dependencies import Inferrer
from lucid_compute.registry.matching_engine import Reason
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.registry.views import view_reason, view_route
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided

router = APIRouter(tags=["inference"])


@router.post("/match", response_model=MatchAnswer, responses=declare(ModelNotFound, ModelNotAllowed, body=True))
async def match(
    body: MatchRequest,
    fleet: Provided[Fleet],
    clock: Provided[DatabaseClock],
    gateway: Provided[Gateway],
    principal: Inferrer,
) -> MatchAnswer:
    """Rank the nodes for a request of a model, and say of the others every reason why not. Nothing is sent.

    A model of format api is served by its upstream, so it has no nodes. `chosen` is the best of the shortlist, or the
    node of the session that `user` names; a request may go to another whose wait is at most a quarter longer.

    If the model has a route, the nodes are those of `servedBy`: the first of its models that can be served now, in
    the order of `route`. That is the order of the session, or of the weights without one.
    """
    model, now = fleet.get_model(body.model), clock.now()
    session = f"{principal.owner} {body.user}" if body.user else None
    dispatcher = gateway.dispatcher
    draw = 0.0 if session is None else draw_of(session)
    choices = [
        Criteria(variant, _policy_of(body), session=session, owner=principal.owner)
        for variant in gateway.variants_for(principal, model, draw)
    ]
    criteria = await _first_served(dispatcher, choices, now)
    ranking = await rank(fleet, dispatcher, criteria, now)
    shortlist = [_view(ranked) for ranked in ranking.shortlist]
    chosen = shortlist[0] if shortlist else None
    if session is not None and (node := dispatcher.find_quickly(criteria, now)) is not None:
        chosen = next((view for view in shortlist if view.passport_id == node.state.id), chosen)
    return MatchAnswer(
        model=model.record.name,
        model_passport_id=model.id,
        served_by=None if model.route is None else criteria.model.record.name,
        route=view_route(fleet, model, now, draw),
        chosen=chosen,
        shortlist=shortlist,
        rejected=[_view_rejected(*each) for each in ranking.rejected],
        rejections=dict(ranking.rejections),
        waiting=None if gateway.queue is None else gateway.queue.waiting(model.id),
    )


def _policy_of(body: MatchRequest) -> RoutingPolicy:
    return NO_POLICY if body.lucid is None else policy_of(body.lucid)


async def _first_served(dispatcher: Dispatcher, choices: list[Criteria], now: datetime) -> Criteria:
    """Return the first of the models that a node may serve now, or an upstream; else the first of all."""
    if len(choices) > 1:
        for criteria in choices:
            has_upstream = criteria.model.record.metadata.get("upstream") is not None
            if has_upstream or await dispatcher.find(criteria, now) is not None:
                return criteria
    return choices[0]


def _view_rejected(node: FleetNode, reasons: Sequence[Reason]) -> RejectedNode:
    views = [view_reason(reason) for reason in reasons]
    return RejectedNode(passport_id=node.state.id, name=node.record.name, reasons=views)


def _view(ranked: Ranked) -> RankedNode:
    state, usage = ranked.node.state, ranked.usage
    heartbeat = state.last_heartbeat.heartbeat if state.last_heartbeat else None
    return RankedNode(
        passport_id=state.id,
        name=ranked.node.record.name,
        score=round(ranked.wait_ms, 3),
        fresh=ranked.is_fresh,
        in_flight=usage.in_flight,
        queue_depth=heartbeat.queue_depth if heartbeat else None,
        load=heartbeat.load if heartbeat else None,
        latency_ms=None if usage.latency_ms is None else round(usage.latency_ms, 3),
        region=state.passport.region,
    )
