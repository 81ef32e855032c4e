"""The claim: nodes that come and go do not make the service grow.

A real `lucid serve`, and clients that register a node, send its heartbeat and deregister it, again and again, each node
with a name, a model and metadata of its own. Ended nodes stay in memory for five minutes, and are then forgotten once a
minute. So the number of nodes in memory grows for six minutes, and then goes up and down by those of a minute. The
worker's memory is judged after the first time that they are most. It is run by name alone
(`python -m benchmarks fleet_churn`), since it takes minutes.

BENCH_CHURN_SECONDS (540), BENCH_CHURN_WARM_SECONDS (390), BENCH_CHURN_CLIENTS (24), and BENCH_CHURN_RATE (60): nodes a
second.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from statistics import linear_regression
from uuid import uuid4

import httpx

from benchmarks.servers import ADMIN_KEY, Server, data_folder, lucid_serve

SECONDS = float(os.environ.get("BENCH_CHURN_SECONDS", "540"))
WARM_SECONDS = float(os.environ.get("BENCH_CHURN_WARM_SECONDS", "390"))
CLIENTS = int(os.environ.get("BENCH_CHURN_CLIENTS", "24"))
RATE = float(os.environ.get("BENCH_CHURN_RATE", "60"))
LOOK_SECONDS = 5.0
SHOW_SECONDS = 30.0
UNLIMITED = {
    "key_writes_per_second": "0",
    "owner_writes_per_second": "0",
    "passports_per_owner": "0",
    "heartbeat_max_per_second": "0",
}


def main() -> None:
    """Let nodes come and go; print the rate, the memory over time, and by how much it grows in ten minutes."""
    with data_folder() as folder, lucid_serve(folder, **UNLIMITED) as server:
        looks, counts = asyncio.run(_churn(server))
    warm = [look for look in looks if look[0] >= WARM_SECONDS]
    for second, memory_mb in looks[:: int(SHOW_SECONDS / LOOK_SECONDS)]:
        print(f"  {second:4.0f} s  {memory_mb:7.1f} MB")
    print(f"{counts['nodes']:,} nodes came and went, {counts['nodes'] / SECONDS:.0f} a second; answers {dict(counts)}")
    slope = linear_regression(*zip(*warm, strict=True)).slope
    print(f"after {WARM_SECONDS:.0f} s: {slope * 600:+.2f} MB in ten minutes")


async def _churn(server: Server) -> tuple[list[tuple[float, float]], Counter[str]]:
    looks: list[tuple[float, float]] = []
    counts: Counter[str] = Counter()
    began = time.monotonic()
    clients = [asyncio.create_task(_come_and_go(server, counts, began)) for _ in range(CLIENTS)]
    while (second := time.monotonic() - began) < SECONDS:
        looks.append((second, server.memory_mb()))
        await asyncio.sleep(LOOK_SECONDS)
    for client in clients:
        client.cancel()
    for ended in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    return looks, counts


async def _come_and_go(server: Server, counts: Counter[str], began: float) -> None:
    """Let one node after the other live for a moment, at most `RATE / CLIENTS` a second."""
    url, headers = f"http://127.0.0.1:{server.port}", {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        done = 0
        while True:
            await _live(client, counts)
            done += 1
            await asyncio.sleep(max(0.0, began + done * CLIENTS / RATE - time.monotonic()))


async def _live(client: httpx.AsyncClient, counts: Counter[str]) -> None:
    name = uuid4().hex
    metadata = {
        "gpu": "NVIDIA A100",
        "vram": "80GB",
        "runtimes": ["vllm"],
        "inferenceUrl": "http://127.0.0.1:8080/v1",
        "note": name * 8,
    }
    made = await client.post("/passports", json={"name": name, "type": "compute", "metadata": metadata})
    counts[f"register {made.status_code}"] += 1
    if not made.is_success:  # 503, when the machine is busy
        return
    node = made.json()["id"]
    beat = {"passportId": node, "status": "healthy", "load": 0.1, "queueDepth": 0, "availableModels": [f"m-{name}"]}
    counts[f"heartbeat {(await client.post('/compute/heartbeat', json=beat)).status_code}"] += 1
    while True:  # a node that stays would be growth of the fleet, and not of the service
        gone = await client.post(f"/compute/deregister/{node}", params={"force": "true"})
        counts[f"deregister {gone.status_code}"] += 1
        if gone.is_success:
            counts["nodes"] += 1
            return
