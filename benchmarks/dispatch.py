"""The claim: choosing a node costs microseconds and no query, at 50,000 nodes that all serve the model.

Without I/O: `find_quickly` at 2 to 50,000 nodes, with and without a policy that half of them suit, and for each of 500
sessions in turn; then what is left for rare cases, which look at many or at every node. In CPU time, so that neighbours
on the machine count little.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import cycle
from random import Random
from statistics import median

from benchmarks.fleet_rows import node_id
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.ranking import rank
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.domain.node_state import Heartbeat, Receipt
from lucid_compute.registry.domain.passports import ModelPassport, Passport, PassportStatus, PassportType
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy

SIZES = (2, 10, 1000, 50_000)
CHOICES = 1000
REPEATS = 25
FULL_REPEATS = 7
SESSIONS = 500
ONE_IN = 1000
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SILENT = NOW + timedelta(seconds=31)
MODEL = "model-id"
HALF = RoutingPolicy(allow_regions=frozenset({"even"}))
FEW = RoutingPolicy(allow_regions=frozenset({"few"}))
NONE = RoutingPolicy(allow_regions=frozenset({"none"}))


def main() -> None:
    """Measure, and print microseconds for a choice from a few looks, then milliseconds for looking at every node."""
    rows: dict[str, list[str]] = {}
    for size in SIZES:
        fleet = _fill(size)
        dispatcher = _acquaint(fleet)
        gc.collect()
        gc.freeze()  # as a worker does
        for name, figure in (*_measure_quick(fleet, dispatcher), *_measure_full(fleet, dispatcher)):
            rows.setdefault(name, []).append(figure)
        gc.unfreeze()
    print(f"{'':<52}{''.join(f'{size:>10,}' for size in SIZES)} nodes that serve the model")
    for name, figures in rows.items():
        print(f"{name:<52}{''.join(f'{figure:>10}' for figure in figures)}")


def _measure_quick(fleet: Fleet, dispatcher: Dispatcher) -> Iterator[tuple[str, str]]:
    model = fleet.get_model(MODEL)
    for name, policy in (("", NO_POLICY), (", by a policy that half suit", HALF)):
        yield f"a choice{name}, us", _time_quick(dispatcher, [Criteria(model, policy)])
        yield f"a session's choice{name}, us", _time_quick(dispatcher, _sessions(model, policy))


def _measure_full(fleet: Fleet, dispatcher: Dispatcher) -> Iterator[tuple[str, str]]:
    model = fleet.get_model(MODEL)
    plain, few, none = Criteria(model), Criteria(model, FEW), Criteria(model, NONE)
    yield "a choice, where one in 1,000 suits, ms", _time_full(lambda: _choose(dispatcher, few, NOW))
    yield "to learn that none suits, ms", _time_full(lambda: _choose(dispatcher, none, NOW))
    yield "a choice, where all are silent for 31 s, ms", _time_full(lambda: _choose(dispatcher, plain, SILENT))
    yield "POST /match, without its bytes, ms", _time_full(lambda: rank(fleet, dispatcher, plain, NOW))


def _sessions(model: ModelPassport, policy: RoutingPolicy) -> list[Criteria]:
    return [Criteria(model, policy, session=f"acme user-{number}") for number in range(SESSIONS)]


async def _choose(dispatcher: Dispatcher, criteria: Criteria, now: datetime) -> object:
    """Choose as the gateway does."""
    return dispatcher.find_quickly(criteria, now) or await dispatcher.find(criteria, now)


def _time_quick(dispatcher: Dispatcher, all_criteria: list[Criteria]) -> str:
    """Return the median microseconds of a choice."""
    seconds = []
    for _ in range(REPEATS):
        requests = [criteria for criteria, _ in zip(cycle(all_criteria), range(CHOICES), strict=False)]
        began = time.process_time()
        for criteria in requests:
            dispatcher.find_quickly(criteria, NOW)
        seconds.append((time.process_time() - began) / CHOICES)
    return f"{median(seconds) * 1e6:,.1f}"


def _time_full(work: Callable[[], Awaitable[object]]) -> str:
    """Return the median milliseconds that `work` takes, on a loop that does nothing else."""

    async def measure() -> float:
        began = time.process_time()
        await work()
        return time.process_time() - began

    return f"{median(asyncio.run(measure()) for _ in range(FULL_REPEATS)) * 1e3:,.2f}"


def _fill(size: int) -> Fleet:
    """Return a fleet of healthy nodes, each with its own load and queue; one in 1,000 is in a region of its own."""
    fleet, random = Fleet(), Random(1)
    fleet.apply_passport(_passport(MODEL, PassportType.MODEL, {"format": "safetensors"}))
    for number in range(size):
        region = "few" if number % ONE_IN == ONE_IN - 1 else ("even", "odd")[number % 2]
        metadata = {"vram": "80GB", "runtimes": ["vllm"], "inferenceUrl": "http://node:8080/v1", "region": region}
        fleet.apply_passport(_passport(node_id(number), PassportType.COMPUTE, {**metadata, "maxConcurrency": 64}))
        beat = {"load": random.random(), "queueDepth": random.randrange(4), "availableModels": ["model"]}
        heartbeat = Heartbeat.model_validate({"passportId": node_id(number), "status": "healthy", **beat})
        fleet.apply_receipt(node_id(number), Receipt(heartbeat, NOW, NOW, 1))
    return fleet


def _acquaint(fleet: Fleet) -> Dispatcher:
    """Return a dispatcher that has measured every node."""
    stats, random = FleetStats(fleet), Random(1)
    for node in fleet.nodes():
        stats.record_latency(node.state.id, (MODEL, False), random.uniform(20, 200))
    return Dispatcher(fleet, stats)


def _passport(passport_id: str, passport_type: PassportType, metadata: dict[str, object]) -> Passport:
    return Passport(
        id=passport_id,
        type=passport_type,
        owner="acme",
        name="model" if passport_type is PassportType.MODEL else passport_id,
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


if __name__ == "__main__":
    main()
