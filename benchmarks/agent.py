"""What an agent costs, and whether its memory stays flat.

`python -m benchmarks agent` measures a minute at the real pace, then six hours hastened: every wait of the agent is cut
by `HASTE`, against a real registry that is stopped now and then, and an inference server that fails and changes models.
`python -m benchmarks.agent 48` hastens through 48 hours instead.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers import LOAD_CORE, Server, data_folder, lucid_serve, on_core, wait_until

HASTE = 300
SECONDS_AT_REAL_PACE = 60
BEATS_AN_HOUR = 400
HOURS = 6
PAUSE_EVERY_SECONDS = 20
_HASTENED = f"""
from lucid_compute.agent import agent, heartbeat_sender, observer, reporter, server_watch
names = "SERVER_SECONDS GPU_SECONDS DESCRIBE_SECONDS SHORTEST_INTERVAL_SECONDS RETRY_AFTER_SECONDS FIRST_SECONDS" + (
    " LONGEST_SECONDS SLOW_RETRY_SECONDS DETECT_AGAIN_SECONDS DOUBT_SECONDS")
for module in (agent, heartbeat_sender, observer, reporter, server_watch):
    for name in names.split():
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) / {HASTE})
reporter.LONGEST_INTERVAL_SECONDS = 9 / {HASTE}
agent.CALL_TIMEOUT_SECONDS = 0.5
"""


@contextmanager
def inference_server() -> Iterator[str]:
    """Run the stand-in; return its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    descriptor = listener.fileno()
    command = [sys.executable, "-m", "benchmarks.agent_backend", str(descriptor)]
    with on_core(LOAD_CORE):
        process = subprocess.Popen(command, pass_fds=[descriptor])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        process.terminate()
        process.wait(60)


@contextmanager
def agent(registry: Server, url: str, log: Path, prepares: str = "") -> Iterator[Server]:
    """Run an agent; return its process, as a server's."""
    code = f"{prepares}\nfrom lucid_compute.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "agent", "run", "--url", url, "--vram", "80GB", "--name", "bench"]
    environment = {**os.environ, "LUCID_API_URL": f"http://127.0.0.1:{registry.port}"}
    environment["LUCID_API_KEY"] = registry.make_key("bench")
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stderr=output)
    try:
        yield Server(0, process.pid)
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def beats_of(registry: Server) -> int:
    """Return how many heartbeats the agent has sent."""
    nodes = registry.call("GET", "/compute?search=bench")["nodes"]
    reported = nodes[0]["health"]["reported"] if nodes else None
    return int(reported["sequence"]) if reported else 0


def measure_cost(registry: Server, url: str, folder: Path) -> None:
    """Print what an agent uses at the real pace, and how long it took to be registered."""
    began = time.monotonic()
    with agent(registry, url, folder / "real.log") as process:
        wait_until(lambda: beats_of(registry) > 0)
        started = time.monotonic() - began
        time.sleep(5)
        before = process.cpu_seconds()
        time.sleep(SECONDS_AT_REAL_PACE)
        share = (process.cpu_seconds() - before) / SECONDS_AT_REAL_PACE
        print(
            f"at the real pace, {SECONDS_AT_REAL_PACE} s: {share:.2%} of a core, {process.memory_mb():.0f} MB resident"
        )
        print(f"from its start, Python's included, to its first heartbeat: {started:.2f} s")


def soak(registry: Server, url: str, folder: Path, hours: float) -> None:
    """Print the agent's memory and open files over hours that pass faster than real ones."""
    log = folder / "hastened.log"
    with agent(registry, url, log, _HASTENED) as process:
        wait_until(lambda: beats_of(registry) > BEATS_AN_HOUR // 4)
        first = beats_of(registry)
        memory: list[float] = []
        paused_at = time.monotonic()
        while beats_of(registry) - first < hours * BEATS_AN_HOUR:
            time.sleep(1)
            memory.append(process.memory_mb())
            if time.monotonic() - paused_at > PAUSE_EVERY_SECONDS:
                paused_at = time.monotonic()
                _pause(registry)
        files = len(list(Path(f"/proc/{process.worker_pid}/fd").iterdir()))
    slope = statistics.linear_regression(range(len(memory)), memory).slope * len(memory)
    text = log.read_text()
    outages, silences = len(re.findall("answers 503", text)), len(re.findall("trying again", text))
    print(
        f"{hours:g} hours hastened, {hours * BEATS_AN_HOUR:.0f} heartbeats, {outages} outages of the inference server, "
        f"{silences} of the registry, {len(re.findall('declared', text))} declarations: {memory[0]:.1f} MB at first, "
        f"{memory[-1]:.1f} at last, {slope:+.2f} MB by regression, {files} open files"
    )


def _pause(registry: Server) -> None:
    """Have the registry answer nothing for a second."""
    os.kill(registry.worker_pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(registry.worker_pid, signal.SIGCONT)


def main(hours: float = HOURS) -> None:
    """Measure the cost, then soak."""
    with (
        data_folder() as folder,
        inference_server() as url,
        lucid_serve(folder, heartbeat_max_per_second="0") as registry,
    ):
        measure_cost(registry, url, folder)
        soak(registry, url, folder, hours)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else HOURS)
