"""Load over HTTP: wrk when it is installed, else a generator of our own; and heartbeats at a steady rate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.servers import LOAD_CORE, on_core

SEQUENCES_A_ROUND = 10_000_000

_WRK_SCRIPT = """
local heads, tail, sequence, at = {}, %(tail)s, %(first)d, 0
for line in io.lines(%(heads)s) do
  heads[#heads + 1] = line:gsub("\\\\r\\\\n", "\\r\\n")
end
function request()
  at = at %% #heads + 1
  if tail == "" then return heads[at] end
  sequence = sequence + 1
  return heads[at] .. sequence .. tail
end
function done(summary, latency, requests)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %%d, "seconds": %%f, "errors": %%d, "p50_ms": %%f, "p99_ms": %%f}',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


class Requests(NamedTuple):
    """What is sent, in turn: each of `heads`, then the next sequence number, then `tail`. No tail, no sequence."""

    heads: Sequence[str]
    tail: str = ""


class Load(NamedTuple):
    """What a round of load found."""

    requests: int
    seconds: float
    errors: int
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Return the rate a second."""
        return self.requests / self.seconds


def heartbeat_requests(passport_ids: Sequence[str], key: str, path: str = "/compute/heartbeat") -> Requests:
    """Return the providers' guide's heartbeat of each node, with the bootId and sequence that agents send."""
    return Requests([_heartbeat_head(passport_id, key, path) for passport_id in passport_ids], "}")


def get_requests(paths: Sequence[str]) -> Requests:
    """Return plain reads of these paths."""
    return Requests([f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" for path in paths])


def has_wrk() -> bool:
    """Return whether the load comes from wrk."""
    return shutil.which("wrk") is not None


def run_load(port: int, requests: Requests, *, connections: int, seconds: float, round_: int = 0) -> Load:
    """Send requests over so many connections, each the next when the last is answered, and return what was found.

    `round_` counts the rounds of one run, so that sequences grow from each to the next.
    """
    first = _first_sequence(round_)
    if has_wrk():
        return _run_wrk(port, requests, connections, seconds, first)
    command = [*_generator(port, requests, first), "--connections", str(connections), "--seconds", str(seconds)]
    return _read(_run(command).stdout)


@contextmanager
def steady_load(
    port: int, requests: Requests, *, per_second: float, round_: int = 0, connections: int = 64
) -> Iterator[list[Load]]:
    """Send requests at a rate for as long as the block runs; `round_` as in `run_load`.

    What was found is in the list after the block.
    """
    command = _generator(port, requests, _first_sequence(round_))
    command += ["--connections", str(connections), "--rate", str(per_second)]
    with on_core(LOAD_CORE):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: list[Load] = []
    try:
        yield found
    finally:
        output, _ = process.communicate("")
    found.append(_read(output))


def _first_sequence(round_: int) -> int:
    return 100_000_000 + round_ * SEQUENCES_A_ROUND


def _heartbeat_head(passport_id: str, key: str, path: str) -> str:
    body = (
        f'{{"passportId":"{passport_id}","status":"healthy","load":0.42,"availableModels":["llama-3-70b","mistral-7b"]'
        ',"queueDepth":3,"bootId":"boot-1","sequence":'
    )
    length = len(body) + len("100000000}")
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )


def _run_wrk(port: int, requests: Requests, connections: int, seconds: float, first: int) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        heads, script = Path(folder) / "heads", Path(folder) / "load.lua"
        heads.write_text("".join(head.replace("\r\n", "\\r\\n") + "\n" for head in requests.heads))
        values = {"tail": json.dumps(requests.tail), "first": first, "heads": json.dumps(str(heads))}
        script.write_text(_WRK_SCRIPT % values)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "-s", str(script), f"http://127.0.0.1:{port}"]
        return _read(_run(command).stderr)


def _generator(port: int, requests: Requests, first: int) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:  # the generator removes it
        json.dump({"port": port, "heads": list(requests.heads), "tail": requests.tail, "first": first}, file)
    return [sys.executable, "-m", "benchmarks.load_generator", file.name]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    with on_core(LOAD_CORE):
        return subprocess.run(command, check=True, capture_output=True, text=True)


def _read(output: str) -> Load:
    return Load(**json.loads(output.strip().splitlines()[-1]))
