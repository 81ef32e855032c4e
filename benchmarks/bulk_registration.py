"""The claim: 100,000 nodes are registered in under 60 s, at less than a tenth of a single call's cost each.

A real `lucid serve` with one worker on its embedded Postgres (fsync on), and a real `lucid passports import` of a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.servers import ADMIN_KEY, LOAD_CORE, Server, data_folder, describe_cores, lucid_serve, on_core

NODES = int(os.environ.get("BENCH_NODES", "100000"))
SINGLES = 500


def node(number: int) -> dict[str, object]:
    """Return a node to register."""
    metadata = {
        "gpu": "NVIDIA A100",
        "vram": "80GB",
        "region": "us-east-1",
        "inferenceUrl": f"http://gpu-{number}.example.com:8080/v1",
        "capabilities": ["inference", "fine-tuning"],
        "maxConcurrency": 8,
    }
    return {"name": f"node-{number:06}", "type": "compute", "metadata": metadata}


def main() -> None:
    """Measure, and print it."""
    with data_folder() as folder, lucid_serve(folder, passports_per_owner="0") as server:
        print(describe_cores())
        began, cpu = time.perf_counter(), server.cpu_seconds()
        for number in range(SINGLES):
            server.call("POST", "/passports", node(NODES + number))
        _print(server, f"{SINGLES:,} one by one", SINGLES, began, cpu)
        file = folder / "nodes.jsonl"
        file.write_text("".join(f"{json.dumps(node(number))}\n" for number in range(NODES)))
        for what in ("imported", "imported again"):
            began, cpu = time.perf_counter(), server.cpu_seconds()
            said = _import(file, server)
            _print(server, f"{NODES:,} {what}", NODES, began, cpu)
            print(f"    {said}")


def _import(file: Path, server: Server) -> str:
    environment = {**os.environ, "LUCID_API_URL": f"http://127.0.0.1:{server.port}", "LUCID_API_KEY": ADMIN_KEY}
    command = [str(Path(sys.executable).with_name("lucid")), "passports", "import", str(file)]
    with on_core(LOAD_CORE):
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def _print(server: Server, what: str, count: int, began: float, cpu: float) -> None:
    took, used = time.perf_counter() - began, server.cpu_seconds() - cpu
    each = f"{took / count * 1000:6.2f} ms each, of the worker's processor {used / count * 1000:5.2f} ms"
    print(f"{what:<26}{took:8.1f} s  {each}")


if __name__ == "__main__":
    main()
