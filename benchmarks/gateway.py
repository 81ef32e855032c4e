"""The claim: chat completions through `lucid serve` cost little more than through a router that does nothing else.

A real `lucid serve` on its embedded Postgres (fsync on), with two nodes and a key, interpreted and compiled; against
vllm-router, which is written in Rust and asks for no key, against other routers, and the backend without a router. The
same requests, load and backend for all, in rounds that alternate, each router pinned to one core; every answer is
checked before it counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import NamedTuple

from benchmarks.gateway_backend import CHUNKS, PACED_CHUNKS
from benchmarks.gateway_load import GatewayLoad, Spec
from benchmarks.gateway_peers import VLLM_ROUTER, Start, peers
from benchmarks.gateway_targets import Skipped, Target, backend, lucid, request_for
from benchmarks.servers import LOAD_CORE, SERVER_CORE, forms, on_core, wait_for_quiet
from lucid_compute.compilation import PYTHON

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
ROUND_SECONDS = float(os.environ.get("BENCH_SECONDS", "2"))
WARM_UP_SECONDS = 0.5
QUIET_TIMEOUT_SECONDS = 3.0
DIRECT = "direct"
PEER = VLLM_ROUTER
_RATE, _LATENCY, _ADDED, _ROUTER = ("rate",), ("p50 ms", "p99 ms"), ("+p50 ms", "+p99 ms"), ("CPU us", "core %")


class Measure(NamedTuple):
    """One kind of load, what is printed of it, and of that what is held against the peer."""

    title: str
    unit: str
    connections: int
    columns: tuple[str, ...]
    compares: tuple[str, ...]
    chunks: int = 0
    is_paced: bool = False

    def spec(self, target: Target, seconds: float) -> Spec:
        """Return the request for the target."""
        content = "At a slow and paced rate." if self.is_paced else "Say something."
        request = request_for(target.key, content=content, stream=self.chunks > 0)
        return Spec(list(target.ports), request, self.chunks, self.is_paced, self.connections, seconds)


MEASURES = (
    Measure("completions, 64 connections", "answers/s", 64, _RATE + _LATENCY + _ROUTER, ("rate", "CPU us")),
    Measure("completions, 8 connections", "answers/s", 8, _RATE + _LATENCY + _ADDED + _ROUTER, _ADDED),
    Measure(f"streams of {CHUNKS} chunks, 64 connections", "chunks/s", 64, _RATE + _ROUTER, ("rate", "CPU us"), CHUNKS),
    Measure(
        "200 paced streams at a time, to the first chunk",
        "chunks/s",
        200,
        _LATENCY + _ADDED + _ROUTER,
        (*_LATENCY, "CPU us"),
        PACED_CHUNKS,
        is_paced=True,
    ),
)


class Sample(NamedTuple):
    """One load on one target, and the processor time that its router took."""

    load: GatewayLoad
    cpu_seconds: float


Round = Mapping[str, Sample]


def main() -> None:
    """Measure, and print each table."""
    with ExitStack() as stack:
        ports = stack.enter_context(backend())
        targets = {DIRECT: Target(ports), **dict(_start_routers(stack, ports))}
        _warm_up(targets)
        rounds: dict[str, list[Round]] = {measure.title: [] for measure in MEASURES}
        for number in range(ROUNDS):
            wait_for_quiet(QUIET_TIMEOUT_SECONDS)
            for measure in MEASURES:
                rounds[measure.title].append(_round(targets, measure, number))
        memory = {name: target.memory_mb() for name, target in targets.items()}
    print(f"{ROUNDS} rounds of {ROUND_SECONDS:g} s; {len(ports)} nodes; {_describe_cores()}; Python {PYTHON}")
    for measure in MEASURES:
        _print_table(measure, rounds[measure.title])
    _print_memory(memory)


def _start_routers(stack: ExitStack, ports: list[int]) -> Iterator[tuple[str, Target]]:
    ours: dict[str, Start] = {f"lucid {form}": partial(lucid, compiled=compiled) for form, compiled in forms().items()}
    wanted = os.environ.get("BENCH_PEERS")
    others = {name: start for name, start in peers().items() if wanted is None or name in wanted.split(",")}
    for name, start in {**ours, **others}.items():
        try:
            yield name, stack.enter_context(start(ports))
        except Skipped as reason:
            print(f"{name} is skipped: {reason}", flush=True)


def _warm_up(targets: Mapping[str, Target]) -> None:
    for target in targets.values():
        for measure in MEASURES:
            if not measure.is_paced:
                _send(measure.spec(target, WARM_UP_SECONDS))


def _round(targets: Mapping[str, Target], measure: Measure, number: int) -> Round:
    """Measure each target once; another one begins in each round."""
    names = list(targets)
    first = number % len(names)
    samples = {}
    for name in names[first:] + names[:first]:
        before = targets[name].cpu_seconds()
        load = _send(measure.spec(targets[name], ROUND_SECONDS))
        samples[name] = Sample(load, targets[name].cpu_seconds() - before)
    return samples


def _send(spec: Spec) -> GatewayLoad:
    command = [sys.executable, "-m", "benchmarks.gateway_load"]
    with on_core(LOAD_CORE):
        done = subprocess.run(command, input=json.dumps(spec._asdict()), check=True, stdout=subprocess.PIPE, text=True)
    return GatewayLoad(**json.loads(done.stdout))


def _figure(round_: Round, name: str, column: str) -> float:
    """Return the text of the column for this target and round."""
    load, cpu_seconds = round_[name]
    direct = round_[DIRECT].load
    return {
        "rate": load.per_second,
        "p50 ms": load.p50_ms,
        "p99 ms": load.p99_ms,
        "+p50 ms": load.p50_ms - direct.p50_ms,
        "+p99 ms": load.p99_ms - direct.p99_ms,
        "CPU us": cpu_seconds / max(1, load.chunks or load.answers) * 1e6,
        "core %": cpu_seconds / load.seconds * 100,
    }[column]


def _print_table(measure: Measure, rounds: list[Round]) -> None:
    """Print the medians, the range of the first thing that is compared, and the ratios."""
    first = measure.compares[0]
    print(f"\n{measure.title}")
    headings = [_heading(measure, column) for column in (*measure.columns, "errors")]
    print(f"{'':<18}" + "".join(f"{heading:>11}" for heading in headings) + f"   {_heading(measure, first)}, rounds")
    for name in rounds[0]:
        figures = [median(_figure(round_, name, column) for round_ in rounds) for column in measure.columns]
        errors = sum(round_[name].load.errors for round_ in rounds)
        of_first = [_figure(round_, name, first) for round_ in rounds]
        span = f"{_in_short(min(of_first))} to {_in_short(max(of_first))}"
        print(f"{name:<18}" + "".join(f"{_in_short(figure):>11}" for figure in figures) + f"{errors:>11}   {span}")
        if errors:
            example = next(round_[name].load.example for round_ in rounds if round_[name].load.errors)
            print(f"  NOT VALID: {name} had {errors} wrong answers, such as {example!r}")
    for name in rounds[0]:
        _print_ratios(measure, rounds, name)


def _print_ratios(measure: Measure, rounds: list[Round], name: str) -> None:
    """Say how the target compares with the peer of the same rounds; of no router only the ceiling is of interest."""
    if PEER not in rounds[0] or name == PEER or (name == DIRECT and "rate" not in measure.compares):
        return
    for column in ("rate",) if name == DIRECT else measure.compares:
        pairs = [(_figure(round_, name, column), _figure(round_, PEER, column)) for round_ in rounds]
        if ratios := [ours / peer for ours, peer in pairs if peer > 0]:
            span = f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"  {_heading(measure, column)}, {name} to {PEER}: {median(ratios):.2f} ({span})")


def _heading(measure: Measure, column: str) -> str:
    return measure.unit if column == "rate" else column


def _print_memory(memory: Mapping[str, list[float]]) -> None:
    print("\nresident memory after the run")
    for name, parts in memory.items():
        if parts:
            detail = " (worker {:.0f}, supervisor {:.0f}; Postgres not counted)".format(*parts) if parts[1:] else ""
            print(f"{name:<18}{sum(parts):>8.0f} MB{detail}")


def _describe_cores() -> str:
    if SERVER_CORE is None:
        return "nothing is pinned: this machine has one core, or can't pin"
    return f"each router on core {SERVER_CORE}; load, backend and Postgres on core {LOAD_CORE}"


def _in_short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.2f}"  # noqa: PLR2004 - four digits are plenty


if __name__ == "__main__":
    main()
