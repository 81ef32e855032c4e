"""Outbound nodes beside direct ones: 1,000 nodes on one replica, 200 of them streaming.

Time to the first chunk, chunks a second, processor time of the worker for a chunk, and its memory. The agents share one
core with the load and the backend, so rates are of the whole, and processor time is the worker's alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.request import Request, urlopen

from benchmarks.gateway_backend import CHUNKS, MODEL, PACED_CHUNKS
from benchmarks.gateway_load import GatewayLoad, Spec
from benchmarks.gateway_targets import backend, beat_once, request_for
from benchmarks.servers import (
    ADMIN_KEY,
    LOAD_CORE,
    Server,
    data_folder,
    describe_cores,
    lucid_serve,
    on_core,
    wait_for_quiet,
    wait_until,
)

NODES = 1000
STREAMS = 200
FEW = 8  # streams at a time, to measure latency without waits in queues
SECONDS = 6.0
CONNECT_SECONDS = 120.0


def main() -> None:
    """Measure both kinds of node and print a row for each."""
    print(f"{NODES:,} nodes, {describe_cores()}")
    print(f"{'':10}{'first chunk p50':>18}{'p99':>10}{'chunks/s':>12}{'us of worker/chunk':>22}{'memory':>10}")
    with backend() as ports:
        for kind in ("direct", "outbound"):
            _measure(kind, ports)


def _measure(kind: str, ports: Sequence[int]) -> None:
    with data_folder() as folder, lucid_serve(folder) as server:
        nodes = _register(server, kind, ports)
        server.call("POST", "/passports", {"name": MODEL, "type": "model", "metadata": {"format": "gguf"}})
        new = {"name": "benchmark", "owner": "acme", "scopes": ["inference:run"]}
        key = str(server.call("POST", "/keys", new)["key"])
        beat_once(server, nodes)
        with _agents(server, kind, nodes, ports):
            beat_once(server, nodes)  # and not during the load, which has one core with all else
            wait_for_quiet()
            paced = _load(server, key, content="paced", chunks=PACED_CHUNKS, connections=FEW)
            beat_once(server, nodes)
            wait_for_quiet()
            before = server.cpu_seconds()
            fast = _load(server, key, content="Say something.", chunks=CHUNKS, connections=STREAMS)
            spent = (server.cpu_seconds() - before) / max(fast.chunks, 1) * 1e6
            print(
                f"{kind:10}{paced.p50_ms:>15.2f} ms{paced.p99_ms:>7.2f} ms{fast.per_second:>12,.0f}{spent:>22.1f}"
                f"{server.memory_mb():>7.0f} MB   errors {paced.errors + fast.errors} {fast.example}",
                flush=True,
            )


def _register(server: Server, kind: str, ports: Sequence[int]) -> list[str]:
    """Register the nodes; return their ids."""
    passports = []
    for number in range(NODES):
        url = f"http://127.0.0.1:{ports[number % len(ports)]}/v1"
        reached = {"inferenceUrl": url} if kind == "direct" else {"connectivity": "outbound"}
        metadata = {"gpu": "none", "vram": "80GB", "runtimes": ["llama.cpp"], **reached}
        passports.append({"name": f"node-{number}", "type": "compute", "metadata": metadata})
    made = server.call("POST", "/passports:batchCreate", {"passports": passports})
    return [str(each["passport"]["id"]) for each in made["results"]]


@contextmanager
def _agents(server: Server, kind: str, nodes: list[str], ports: Sequence[int]) -> Iterator[None]:
    """Run the nodes' agents, connected when the block begins."""
    if kind == "direct":
        yield
        return
    spec = {
        "url": f"http://127.0.0.1:{server.port}",
        "key": server.call("POST", "/keys", {"name": "agents", "owner": "admin", "scopes": ["admin"]})["key"],
        "nodes": nodes,
        "ports": list(ports),
    }
    with on_core(LOAD_CORE):
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.outbound_agents"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec).encode())
    process.stdin.close()
    try:
        wait_until(lambda: _tunnels_of(server) == len(nodes), CONNECT_SECONDS)
        yield
    finally:
        process.terminate()
        process.wait(60)


def _tunnels_of(server: Server) -> int:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with urlopen(Request(f"http://127.0.0.1:{server.port}/metrics", headers=headers), timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("lucid_tunnels "))))


def _load(server: Server, key: str, *, content: str, chunks: int, connections: int) -> GatewayLoad:
    request = request_for(key, content=content, stream=True)
    spec = Spec([server.port], request, chunks, content == "paced", connections, SECONDS)
    with on_core(LOAD_CORE):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gateway_load"],
            input=json.dumps(spec._asdict()),
            capture_output=True,
            text=True,
            check=True,
        )
    return GatewayLoad(**json.loads(done.stdout))


if __name__ == "__main__":
    main()
