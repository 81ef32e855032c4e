"""The demo from its first process to the end of the last one."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from demo.clients import Clients
from demo.processes import DemoFailed, Processes
from demo.report import compare, introduction
from demo.scenario import Scenario, start_network
from lucid_compute.client import LucidClientError

MINUTES = 1.5
SHORTEST_MINUTES = 0.3
ENDING_SECONDS = 4.0  # of the time, for the report and the end of all processes
WARM_UP = 5  # requests to each node: the first one takes ten times as long, and would count against the node
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Demo:
    """One run. The first signal ends it in order, a second one at once."""

    def __init__(self, minutes: float, port: int) -> None:
        """Start no process yet; port 0 is a free one."""
        self._seconds, self._port = 60 * minutes, port
        self._began_at = time.monotonic()
        self._has_reader = True
        self._signal: signal.Signals | None = None
        self._is_stopped = asyncio.Event()
        for number in STOPPING:
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        self._processes = Processes()

    async def run(self) -> int:
        """Return the exit status: 0, 1 when something went wrong, above 128 when a signal ended it."""
        watching = asyncio.create_task(self._processes.watch())
        playing = asyncio.create_task(self._play())
        tasks = (watching, playing, asyncio.create_task(self._is_stopped.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if playing.done():  # a request may fail before `watch` sees that a process ended
                await asyncio.wait([watching], timeout=1.0 if playing.exception() else 0.0)
            for task in tasks:
                task.cancel()
            watched, played, _ = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._processes.clear()
        status = self._status(watched, played)
        self._say("Every process has ended, and the temporary folder is gone.")
        return status

    async def _play(self) -> int:
        since = datetime.now(UTC)
        self._say("Starting the service, three inference servers and three agents.")
        network = await start_network(self._processes, self._port)
        clients = Clients(network.url, network.consumers)
        for node in WARM_UP * network.nodes:
            await clients.reach(node.id)
        self._say("All of them are ready, and requests flow.")
        self._print(introduction(network, self._processes.data_dir))
        scenario = Scenario(self._processes, network, clients, self._say)
        requesting, counting = asyncio.create_task(clients.run()), asyncio.create_task(scenario.print_counts())
        try:
            await scenario.play(self._seconds - (time.monotonic() - self._began_at) - ENDING_SECONDS)
            clients.stop()
            await requesting
        finally:
            requesting.cancel()
            counting.cancel()
            await asyncio.gather(requesting, counting, return_exceptions=True)
        self._say("The requests have ended; this is what the service says of them.")
        report = await compare(network, clients.counts, since)
        self._print(report.text())
        return 0 if report.reconciles and not clients.counts.errors else 1

    def _stop(self, number: signal.Signals) -> None:
        """End in order; the second time at once."""
        if self._signal is None:
            self._signal = number
            self._say(f"{number.name}: ending every process.")
            self._is_stopped.set()
        else:
            self._processes.is_hasty = True

    def _status(self, watched: object, played: object) -> int:
        """Return the exit status; print what went wrong."""
        if self._signal is not None:
            return 128 + self._signal
        for outcome in (watched, played):
            if isinstance(outcome, DemoFailed | LucidClientError):
                self._say(f"The demo can't go on: {outcome}")
                return 1
            if isinstance(outcome, Exception):
                raise outcome
        return played if isinstance(played, int) else 1

    def _say(self, event: str) -> None:
        """Print an event with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._began_at), 60)
        self._print(f"{minutes:02}:{seconds:02}  {event}")

    def _print(self, text: str) -> None:
        """Print, and end the demo when its output has no reader any more, as with `| head`."""
        if not self._has_reader:
            return
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except OSError:
            self._has_reader = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered
            self._stop(signal.SIGPIPE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description="Show the complete product on this machine.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long; {MINUTES} by default")
    parser.add_argument("--port", type=int, default=0, help="the service's port; 0, the default, is a free one")
    options = parser.parse_args(arguments)
    if not options.minutes >= SHORTEST_MINUTES:
        parser.error(f"--minutes: {SHORTEST_MINUTES} is the shortest")

    async def run() -> int:
        return await Demo(options.minutes, options.port).run()

    return asyncio.run(run())
