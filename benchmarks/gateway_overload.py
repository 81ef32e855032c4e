"""The claim: offered twice what it takes, the gateway serves nearly as much as at its peak, and refuses the rest soon.

The peak is found by a closed loop; then twice as much is offered by an open one (`benchmarks.open_loop`), while nodes
send heartbeats. Once with `LUCID_INFERENCE_MAX_CONCURRENCY` as shipped and once for each value of BENCH_OVERLOAD_LIMITS
(`64,256`). The goals are printed beside the figures. Run by name alone (`python -m benchmarks gateway_overload`).

BENCH_SECONDS (5) is how long each load lasts, BENCH_OVERLOAD (2) how many times the peak is offered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gateway import MEASURES, Measure
from benchmarks.gateway_load import GatewayLoad
from benchmarks.gateway_targets import Target, backend, lucid, request_for
from benchmarks.load import heartbeat_requests, steady_load
from benchmarks.open_loop import Found, Schedule
from benchmarks.servers import LOAD_CORE, Server, describe_cores, on_core

SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
TIMES = float(os.environ.get("BENCH_OVERLOAD", "2"))
LIMITS = os.environ.get("BENCH_OVERLOAD_LIMITS", "64,256").split(",")
CONNECTIONS = 4000
BEATING_NODES = 100
BEATS_A_SECOND = 50
SHIPPED = "as shipped"


def main() -> None:
    """Measure with each limit, and print a table."""
    print(f"{TIMES:g} times the peak for {SECONDS:g} s, over {CONNECTIONS} connections at most; {describe_cores()}")
    with backend() as ports:
        for limit in (SHIPPED, *LIMITS):
            settings = {} if limit == SHIPPED else {"inference_max_concurrency": limit}
            with lucid(ports, **settings) as target:
                _measure(limit, target)


def _measure(limit: str, target: Target) -> None:
    server = target.processes[0]
    key = server.make_key("acme")
    beats = heartbeat_requests(_register_nodes(server, key), key)
    _run_closed(MEASURES[0], target)  # warms up
    calm, peak = _run_closed(MEASURES[1], target), _run_closed(MEASURES[0], target)
    with steady_load(server.port, beats, per_second=BEATS_A_SECOND, connections=16) as heard:
        before = server.cpu_seconds()
        found = _run_open(Schedule(server.port, request_for(target.key), TIMES * peak.per_second, SECONDS, CONNECTIONS))
        busy = (server.cpu_seconds() - before) / SECONDS
    beaten = heard[0]
    print(f"\nLUCID_INFERENCE_MAX_CONCURRENCY {limit}: peak {peak.per_second:,.0f}/s, p99 {peak.p99_ms:.1f} ms")
    print(f"  (8 connections: p99 {calm.p99_ms:.1f} ms; the load itself was late by {found.late_p99_ms:.1f} ms at p99)")
    print(f"  accepted {found.accepted:,}, refused {found.refused:,}, others {found.others or 'none'}; core {busy:.0%}")
    _print_goal("goodput of peak", found.accepted / SECONDS / peak.per_second, 0.9, is_least=True)
    _print_goal("accepted p99, times the peak's", found.accepted_p99_ms / peak.p99_ms, 3.0)
    _print_goal("accepted p99 ms", found.accepted_p99_ms, None)
    _print_goal("refused p99 ms", found.refused_p99_ms, 50.0)
    _print_goal("timed out", found.others.get("timed out", 0), 0.0)
    _print_goal("heartbeats that succeeded", 1 - beaten.errors / max(1, beaten.requests), 0.999, is_least=True)
    print(f"    ({beaten.requests} of {BEATS_A_SECOND * SECONDS:.0f} or so were answered, p99 {beaten.p99_ms:.1f} ms)")


def _register_nodes(server: Server, key: str) -> Sequence[str]:
    metadata = {"gpu": "none", "vram": "80GB", "runtimes": ["vllm"], "inferenceUrl": "http://127.0.0.1:8080/v1"}
    new = [{"name": f"beating-{number}", "type": "compute", "metadata": metadata} for number in range(BEATING_NODES)]
    return [str(server.call("POST", "/passports", node, key)["id"]) for node in new]


def _run_closed(measure: Measure, target: Target) -> GatewayLoad:
    return GatewayLoad(**_run("benchmarks.gateway_load", measure.spec(target, SECONDS)._asdict()))


def _run_open(schedule: Schedule) -> Found:
    return Found(**_run("benchmarks.open_loop", schedule._asdict()))


def _run(module: str, spec: object) -> Any:
    with on_core(LOAD_CORE):
        command = [sys.executable, "-m", module]
        done = subprocess.run(command, input=json.dumps(spec), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _print_goal(name: str, figure: float, goal: float | None, *, is_least: bool = False) -> None:
    said = "" if goal is None else f"   goal: at {'least' if is_least else 'most'} {goal:g}"
    is_met = goal is None or (figure >= goal if is_least else figure <= goal)
    print(f"    {name:<32}{figure:>10.3f}{said}{'' if is_met else '   MISSED'}")


if __name__ == "__main__":
    main()
