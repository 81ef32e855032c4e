"""The models that a name stands for: its owner's route, resolved in the fleet, and whether one of them can run now.

A route is followed once: the route of a model that it names is ignored. So no route leads in a circle.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.matching_engine import has_available_compute, has_serving_compute


def variants_of(fleet: Fleet, model: ModelPassport, draw: float = 0.0) -> list[ModelPassport]:
    """Return the models that requests for the model go to: each when those before it can't be served.

    `draw`, from 0 to 1 without 1, says which of the weighted ones is the first; 0.0 is the heaviest. Names without an
    active model are left out. Without a route, or if nothing is left of it, it is the model itself.
    """
    if model.route is None:
        return [model]
    own = {*model.known_as, model.record.name}
    names = model.route.in_order(model.record.name, draw)
    found = (model if name in own else fleet.find_model(name) for name in names)
    variants = {each.id: each for each in found if each is not None and (each is model or each.record.is_active)}
    return [*variants.values()] or [model]


def is_available(fleet: Fleet, model: ModelPassport, now: datetime) -> bool:
    """Return whether the model, or one that its route names, could run right now."""
    return any(has_available_compute(each, fleet.candidates(each, now), now) for each in _judged(fleet, model))


def is_served(fleet: Fleet, model: ModelPassport, now: datetime) -> bool:
    """Return whether the model, or one that its route names, could run now on a node that declares or reports it."""
    return any(has_serving_compute(each, fleet.serving_candidates(each, now), now) for each in _judged(fleet, model))


def _judged(fleet: Fleet, model: ModelPassport) -> Iterator[ModelPassport]:
    """Yield the models of which one is enough; a model of format api is always available itself."""
    if model.route is None or model.format is ModelFormat.API:
        yield model
    else:
        yield from variants_of(fleet, model)
