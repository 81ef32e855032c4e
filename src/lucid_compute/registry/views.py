"""Builds responses about passports, nodes and models; what they contain depends on the viewer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lucid_compute.registry.compute_registry import Health
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.metadata import shown_metadata
from lucid_compute.registry.domain.node_state import Heartbeat, JobStatistics, NodeStatus, Receipt
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport, Passport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import (
    Reason,
    distance_of,
    fit_reasons,
    has_available_compute,
    has_serving_compute,
    rejection_reasons,
)
from lucid_compute.registry.shapes import (
    Declaration,
    DrainAnswer,
    ModelAvailability,
    ModelView,
    NodeEligibility,
    NodeHealth,
    NodeView,
    PassportView,
    ReasonView,
    ReportedState,
    ResolvedDeclaration,
    VariantView,
)
from lucid_compute.registry.variants import is_available, is_served, variants_of
from lucid_compute.web.lists import PageRequest
from lucid_compute.web.turns import in_turns

_NODES_A_TURN = 500


@dataclass(frozen=True, slots=True)
class Shown:
    """Which nodes an explanation lists: those with one reason, and one page of them; None is all."""

    reason: str | None
    page: PageRequest | None


def view_passport(passport: Passport, viewer: Principal | None) -> PassportView:
    """Return a passport; only a model's owner and admins see all of its metadata. Secrets are never shown."""
    return PassportView(**_passport_fields(passport, viewer))


def view_model(fleet: Fleet, model: ModelPassport, viewer: Principal | None, now: datetime) -> ModelView:
    """Return a model passport, whether a node can run it right now, and whether one serves it."""
    fields = _passport_fields(model.record, viewer)
    return ModelView(
        **fields,
        available=is_available(fleet, model, now),
        served=is_served(fleet, model, now),
    )


def view_route(fleet: Fleet, model: ModelPassport, now: datetime, draw: float = 0.0) -> list[VariantView]:
    """Return the models that the model's route names, in the order in which they are tried; empty without a route."""
    if model.route is None:
        return []
    weights = dict(model.route.weights)
    return [
        VariantView(
            model=each.record.name,
            model_passport_id=each.id,
            weight=next((weights[name] for name in (*each.known_as, each.record.name) if name in weights), None),
            available=has_available_compute(each, fleet.candidates(each, now), now),
            served=has_serving_compute(each, fleet.serving_candidates(each, now), now),
        )
        for each in variants_of(fleet, model, draw)
    ]


def view_node(health: Health, viewer: Principal, statistics: JobStatistics) -> NodeView:
    """Return a node's passport and health."""
    return NodeView(**_passport_fields(health.node.record, viewer), health=view_health(health, statistics))


def view_health(health: Health, statistics: JobStatistics) -> NodeHealth:
    """Return a node's health as the registry sees it, with the statistics of its jobs."""
    state, receipt = health.node.state, health.node.state.last_heartbeat
    return NodeHealth(
        passport_id=state.id,
        status=health.status,
        fresh=state.is_fresh(health.at),
        stopped=health.has_stopped,
        uptime_seconds=health.uptime_seconds,
        jobs_completed=statistics.jobs_completed,
        avg_latency_ms=statistics.avg_latency_ms,
        error_rate=statistics.error_rate,
        last_heartbeat_at=receipt.received_at if receipt else None,
        heartbeat_age_seconds=_age_seconds(receipt, health.at),
        load=receipt.heartbeat.load if receipt else None,
        queue_depth=receipt.heartbeat.queue_depth if receipt else None,
        in_flight=health.in_flight,
        drained=health.is_drained,
        available_models=receipt.heartbeat.available_models if receipt else [],
        reasons=[view_reason(reason) for reason in health.reasons],
        reported=_view_report(receipt) if receipt else None,
    )


def view_declaration(fleet: Fleet, node: FleetNode) -> Declaration:
    """Return a node's declaration, each entry with the model that it resolves to right now."""
    models = []
    for declared in node.state.declared.values():
        model = fleet.find_model(declared.id)
        models.append(
            ResolvedDeclaration(
                id=declared.id,
                max_tokens=declared.max_tokens,
                quantization=declared.quantization,
                model_passport_id=model.id if model else None,
            )
        )
    return Declaration(passport_id=node.state.id, models=models)


def view_drain(fleet: Fleet, node: FleetNode) -> DrainAnswer:
    """Return the progress of a drain."""
    return DrainAnswer(
        passport_id=node.state.id,
        status=NodeStatus.DRAINING,
        in_flight=fleet.in_flight(node.state.id),
        drained=fleet.is_drained(node),
    )


async def explain_availability(
    fleet: Fleet, model: ModelPassport, viewer: Principal | None, now: datetime, *, shown: Shown | None = None
) -> ModelAvailability:
    """Return whether a model is available, with every reason of the viewer's nodes and a summary over all nodes.

    `shown` says which of the viewer's nodes are listed; None lists all.
    """
    listed: list[tuple[FleetNode, tuple[Reason, ...]]] = []
    only_reason = None if shown is None else shown.reason
    async for node, reasons in _reasons_of_nodes(fleet, model, viewer, now):
        if only_reason is None or any(reason.code == only_reason for reason in reasons):
            listed.append((node, reasons))
    listed.sort(key=lambda pair: (pair[0].record.has_ended, distance_of(pair[1]), pair[0].record.name))
    page = None if shown is None else shown.page
    availability = ModelAvailability(
        available=is_available(fleet, model, now),
        served=is_served(fleet, model, now),
        checked_at=now,
        nodes=[_view_eligibility(*pair) for pair in (listed if page is None else page.slice_of(listed))],
        summary=fleet.summarise_reasons(model, now),
    )
    more: dict[str, Any] = {} if page is None else {"pagination": page.pagination(len(listed))}
    if model.route is not None:
        more["route"] = view_route(fleet, model, now)
    return availability.model_copy(update=more) if more else availability


async def _reasons_of_nodes(
    fleet: Fleet, model: ModelPassport, viewer: Principal | None, now: datetime
) -> AsyncIterator[tuple[FleetNode, tuple[Reason, ...]]]:
    """Yield each of the viewer's nodes with the reasons against it; the event loop serves other requests in between."""
    if viewer is None or model.format is ModelFormat.API:
        return
    fits: dict[int, tuple[Reason, ...]] = {}  # by capability class: its nodes have the same
    async for node in in_turns(fleet.nodes(owner=viewer.visible_owner), _NODES_A_TURN):
        kind = id(node.capability_class)
        if kind not in fits:
            fits[kind] = fit_reasons(model, node.state)
        yield node, rejection_reasons(model, node.state, now, of_kind=fits[kind])


def _view_eligibility(node: FleetNode, reasons: tuple[Reason, ...]) -> NodeEligibility:
    views = [view_reason(reason) for reason in reasons]
    return NodeEligibility(passport_id=node.state.id, name=node.record.name, eligible=not reasons, reasons=views)


def _passport_fields(passport: Passport, viewer: Principal | None) -> dict[str, Any]:
    is_public_view = viewer is None or viewer.visible_owner not in (None, passport.owner)
    return {
        "id": passport.id,
        "type": passport.type,
        "name": passport.name,
        "description": passport.description,
        "version": passport.version,
        "tags": list(passport.tags),
        "owner": passport.owner,
        "status": passport.status,
        "metadata": shown_metadata(passport.type, passport.metadata, to_everyone=is_public_view),
        "created_at": passport.created_at,
        "updated_at": passport.updated_at,
    }


def _age_seconds(receipt: Receipt | None, now: datetime) -> float | None:
    return None if receipt is None else round(max((now - receipt.received_at).total_seconds(), 0.0), 3)


def view_reason(reason: Reason) -> ReasonView:
    """Return one failing rule as it is shown."""
    return ReasonView(code=reason.code.value, message=reason.message, wanted=reason.wanted, found=reason.found)


def _view_report(receipt: Receipt) -> ReportedState:
    sent_at = receipt.heartbeat.sent_at
    offset = None if sent_at is None else round((sent_at - receipt.received_at).total_seconds(), 3)
    reported = {name: getattr(receipt.heartbeat, name) for name in ReportedState.model_fields if name in _REPORTED}
    return ReportedState(**reported, clock_offset_seconds=offset)


_REPORTED = frozenset(Heartbeat.model_fields)
