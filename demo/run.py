"""The demo from its first process to the last one's end."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx

from demo.cast import Cast, assemble
from demo.children import DemoFailed
from demo.narrator import Narrator
from demo.plot import Plot
from demo.stage import Stage
from demo.summary import sum_up
from demo.traffic import Traffic
from demo.words import what_it_came_to, what_to_look_at
from lucid_compute.client import LucidClientError

MINUTES = 1.5
SHORTEST_MINUTES = 0.3
ENDING_SECONDS = 4.0  # of the time that is asked for: summing up, and ending everything
WARM_UP = 5  # requests of each node: the first one takes ten times as long, and would count against it
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Demo:
    """One run. The first signal ends it in order, a second one at once."""

    def __init__(self, minutes: float, port: int) -> None:
        """Start no process yet, on the running loop; port 0 is a free one."""
        self._seconds, self._port = 60 * minutes, port
        self._narrator = Narrator(lambda: self._stop(signal.SIGPIPE))
        self._signal: signal.Signals | None = None
        self._is_stopped = asyncio.Event()
        for number in STOPPING:
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        self._stage = Stage()  # from here on there is something to clear away

    async def run(self) -> int:
        """Return the exit status: 0, 1 when something went wrong, 128 and more when a signal ended it."""
        watching = asyncio.create_task(self._stage.watch())
        playing = asyncio.create_task(self._play())
        stopping = asyncio.create_task(self._is_stopped.wait())
        tasks = (watching, playing, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if playing.done():  # it notices that a process ended by what that one no longer answers
                await asyncio.wait([watching], timeout=1.0 if playing.exception() else 0.0)
            for task in tasks:
                task.cancel()
            watched, played, _ = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._stage.clear()
        status = self._status(watched, played)
        self._narrator.tell("Every process has ended, and the temporary folder is gone.")
        return status

    async def _play(self) -> int:
        since = datetime.now(UTC)
        self._narrator.tell("Starting the service, three inference servers and three agents.")
        cast = await assemble(self._stage, self._port)
        traffic = Traffic(cast.url, cast.consumers)
        for node in WARM_UP * cast.nodes:
            await traffic.greet(node.passport_id)
        self._narrator.tell("All of them are ready, and requests flow.")
        has_dashboard = await _has_dashboard(cast)
        self._narrator.show(what_to_look_at(cast, self._stage.data_dir, has_dashboard=has_dashboard))
        plot = Plot(self._stage, cast, self._narrator, traffic)
        flowing, observing = asyncio.create_task(traffic.flow()), asyncio.create_task(plot.observe())
        try:
            await plot.play(self._seconds - self._narrator.seconds - ENDING_SECONDS)
            traffic.stop()
            await flowing
        finally:
            flowing.cancel()
            observing.cancel()
            await asyncio.gather(flowing, observing, return_exceptions=True)
        self._narrator.tell("The requests have ended; this is what the service says of them.")
        summary = await sum_up(cast, traffic.tally, since)
        self._narrator.show(what_it_came_to(summary, traffic.tally))
        return 0 if summary.reconciles and not traffic.tally.errors else 1

    def _stop(self, number: signal.Signals) -> None:
        """End in order; the second time at once."""
        if self._signal is None:
            self._signal = number
            self._narrator.tell(f"{number.name}: ending every process.")
            self._is_stopped.set()
        else:
            self._stage.is_hasty = True

    def _status(self, watched: object, played: object) -> int:
        """Return the exit status, and say what went wrong, if something did."""
        if self._signal is not None:
            return 128 + self._signal
        for outcome in (watched, played):
            if isinstance(outcome, DemoFailed | LucidClientError):
                self._narrator.tell(f"The demo can't go on: {outcome}")
                return 1
            if isinstance(outcome, Exception):
                raise outcome
        return played if isinstance(played, int) else 1


async def _has_dashboard(cast: Cast) -> bool:
    """Return whether there is a page where a browser would look for one."""
    async with httpx.AsyncClient(base_url=cast.url, trust_env=False) as browser:
        return (await browser.get("/dashboard")).status_code != httpx.codes.NOT_FOUND


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description="Show the whole product alive on this machine.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long, {MINUTES} unless said otherwise")
    parser.add_argument("--port", type=int, default=0, help="the service's port; 0, the default, is a free one")
    told = parser.parse_args(arguments)
    if not told.minutes >= SHORTEST_MINUTES:
        parser.error(f"--minutes: {SHORTEST_MINUTES} is the shortest")
    return asyncio.run(_run(told.minutes, told.port))


async def _run(minutes: float, port: int) -> int:
    return await Demo(minutes, port).run()
