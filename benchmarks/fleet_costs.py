"""The claim: on hot paths the cost of the fleet in memory grows with the kinds of node, not with the nodes.

Without I/O, on 500 and on 50,000 nodes of the same kinds: `apply_receipt`, the filter over 1,000 models through the
index, and `has_available_compute` by brute force over every node. Both ways' verdicts are compared before that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from statistics import median

from benchmarks.fleet_rows import NodeRow
from benchmarks.fleet_shapes import models, nodes_of_many_kinds
from lucid_compute.registry.domain.node_state import DeclaredModel, Heartbeat, Receipt
from lucid_compute.registry.domain.passports import ModelPassport, Passport, PassportStatus, PassportType
from lucid_compute.registry.fleet.fleet import Fleet, Lifecycle
from lucid_compute.registry.matching_engine import has_available_compute

SIZES = (500, 50_000)
REPEATS = 15
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_BRUTE_FORCE_MODELS = 20


def main() -> None:
    """Measure, and print the ratios."""
    print(f"{'':<52}{SIZES[0]:>10,}{SIZES[1]:>10,} nodes")
    rows = [_measure(size) for size in SIZES]
    for name in rows[0]:
        small, large = (row[name] for row in rows)
        print(f"{name:<52}{small:>10,.2f}{large:>10,.2f}   ratio {large / small:.2f}")


def _measure(size: int) -> dict[str, float]:
    nodes = nodes_of_many_kinds(size)
    fleet = _fill(nodes)
    known = fleet.models_newest_first()
    states = [node.state for node in fleet.nodes()]
    sample = known[:: len(known) // _BRUTE_FORCE_MODELS]
    for model in sample:
        assert _is_available(fleet, model) is has_available_compute(model, states, NOW)
    beats = [(node.id, _heartbeat(node.id)) for node in nodes[:: max(1, size // 1000)]]
    return {
        "apply_receipt, us": _time(lambda turn: _apply(fleet, beats, turn)) / len(beats) * 1e6,
        "filter 1,000 models through the index, us": _time(lambda _: [_is_available(fleet, m) for m in known]) * 1e6,
        "one model by brute force over every node, us": _time(
            lambda _: [has_available_compute(model, states, NOW) for model in sample]
        )
        / len(sample)
        * 1e6,
    }


def _is_available(fleet: Fleet, model: ModelPassport) -> bool:
    return has_available_compute(model, fleet.candidates(model, NOW), NOW)


def _time(work: Callable[[int], object]) -> float:
    """Return the median seconds that `work` takes; it gets the number of the turn."""
    seconds = []
    for turn in range(REPEATS):
        began = time.perf_counter()
        work(turn)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _apply(fleet: Fleet, beats: list[tuple[str, Heartbeat]], turn: int) -> None:
    received_at = NOW + timedelta(milliseconds=turn + 1)
    for passport_id, heartbeat in beats:
        fleet.apply_receipt(passport_id, Receipt(heartbeat, received_at, NOW, turn + 2))


def _fill(nodes: list[NodeRow]) -> Fleet:
    fleet = Fleet()
    for number, metadata in enumerate(models()):
        fleet.apply_passport(_passport(f"model-id-{number}", PassportType.MODEL, f"model-{number}", metadata))
    for number, node in enumerate(nodes):
        declared = {name: DeclaredModel(name) for name in node.declared}
        fleet.apply_passport(_passport(node.id, PassportType.COMPUTE, f"node-{number}", dict(node.metadata)))
        fleet.apply_lifecycle(Lifecycle(node.id, declared, None, None, "registered", 1))
        fleet.apply_receipt(node.id, Receipt(_heartbeat(node.id), NOW, NOW, 1))
    return fleet


def _passport(passport_id: str, passport_type: PassportType, name: str, metadata: dict[str, object]) -> Passport:
    return Passport(
        id=passport_id,
        type=passport_type,
        owner="acme",
        name=name,
        description=None,
        version=None,
        tags=(),
        status=PassportStatus.ACTIVE,
        metadata=metadata,
        created_at=NOW,
        updated_at=NOW,
        deregistered_at=None,
        revision=1,
    )


def _heartbeat(passport_id: str) -> Heartbeat:
    body = {"passportId": passport_id, "status": "healthy", "load": 0.42, "availableModels": [], "queueDepth": 3}
    return Heartbeat.model_validate(body)


if __name__ == "__main__":
    main()
