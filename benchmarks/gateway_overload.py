"""The claim: at twice its capacity, the gateway serves nearly as much as at its peak, and refuses the rest soon.

The peak is found by a closed loop; then twice as much is offered by an open one (`benchmarks.open_loop`), while nodes
send heartbeats. First with nodes that take a while and a limit that they fit, as in use: there the goals have to be
met. Then with nodes that answer at once, so that this service's own processor is what there is too little of: with
`LUCID_INFERENCE_MAX_CONCURRENCY` as shipped, and with a small one. Run by name alone.

BENCH_SECONDS (5) is how long each load lasts, BENCH_OVERLOAD (2) how many times the peak is offered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gateway import WARM_UP_SECONDS
from benchmarks.gateway_load import GatewayLoad, Spec
from benchmarks.gateway_targets import Target, backend, lucid, request_for
from benchmarks.load import heartbeat_requests, steady_load
from benchmarks.open_loop import Found, Schedule
from benchmarks.servers import LOAD_CORE, Server, describe_cores, on_core

SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
TIMES = float(os.environ.get("BENCH_OVERLOAD", "2"))
CONNECTIONS = 1000
LIMIT = 64
BEATING_NODES = 100
BEATS_A_SECOND = 50
CASES = (("Let me ponder.", LIMIT), ("Say something.", None), ("Say something.", LIMIT))


def main() -> None:
    """Measure with each limit, and print a table."""
    print(f"{TIMES:g} times the peak for {SECONDS:g} s, over {CONNECTIONS} connections; {describe_cores()}")
    with backend() as ports:
        for content, limit in CASES:
            settings = {} if limit is None else {"inference_max_concurrency": str(limit)}
            with lucid(ports, **settings) as target:
                print(f"\n{content} LUCID_INFERENCE_MAX_CONCURRENCY {limit or 'as shipped'}")
                _measure(content, target)


def _measure(content: str, target: Target) -> None:
    server, request = target.processes[0], request_for(target.key, content=content)
    key = server.make_key("acme")
    beats = heartbeat_requests(_register_nodes(server, key), key)
    closed = Spec([server.port], request, 0, False, LIMIT, SECONDS)
    _run_closed(closed._replace(seconds=WARM_UP_SECONDS))
    peak = _run_closed(closed)
    with steady_load(server.port, beats, per_second=BEATS_A_SECOND, connections=16) as heard:
        before = server.cpu_seconds()
        found = _run_open(Schedule(server.port, request, TIMES * peak.per_second, SECONDS, CONNECTIONS))
        busy = (server.cpu_seconds() - before) / SECONDS
    beaten = heard[0]
    print(f"  peak {peak.per_second:,.0f}/s, p99 {peak.p99_ms:.1f} ms; sent late by {found.late_p99_ms:.1f} ms at p99")
    print(f"  accepted {found.accepted:,}, refused {found.refused:,}, others {found.others or 'none'}; core {busy:.0%}")
    _print_goal("goodput of peak", found.in_time / SECONDS / peak.per_second, 0.9, is_least=True)
    _print_goal("accepted p99, times the peak's", found.accepted_p99_ms / peak.p99_ms, 3.0)
    _print_goal("refused p99 ms", found.refused_p99_ms, 50.0)
    _print_goal("timed out", found.others.get("timed out", 0), 0.0)
    _print_goal("heartbeats that succeeded", 1 - beaten.errors / max(1, beaten.requests), 0.999, is_least=True)
    print(f"    ({beaten.requests} heartbeats were answered, p99 {beaten.p99_ms:.1f} ms)")


def _register_nodes(server: Server, key: str) -> Sequence[str]:
    metadata = {"gpu": "none", "vram": "80GB", "runtimes": ["vllm"], "inferenceUrl": "http://127.0.0.1:8080/v1"}
    new = [{"name": f"beating-{number}", "type": "compute", "metadata": metadata} for number in range(BEATING_NODES)]
    return [str(server.call("POST", "/passports", node, key)["id"]) for node in new]


def _run_closed(spec: Spec) -> GatewayLoad:
    return GatewayLoad(**_run("benchmarks.gateway_load", spec._asdict()))


def _run_open(schedule: Schedule) -> Found:
    return Found(**_run("benchmarks.open_loop", schedule._asdict()))


def _run(module: str, spec: object) -> Any:
    with on_core(LOAD_CORE):
        command = [sys.executable, "-m", module]
        done = subprocess.run(command, input=json.dumps(spec), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _print_goal(name: str, figure: float, goal: float, *, is_least: bool = False) -> None:
    is_met = figure >= goal if is_least else not figure > goal  # without requests there is no figure
    said = f"goal: at {'least' if is_least else 'most'} {goal:g}"
    print(f"    {name:<32}{figure:>10.3f}   {said}{'' if is_met else '   MISSED'}")


if __name__ == "__main__":
    main()
