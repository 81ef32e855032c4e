"""Watch the inference server: which runtime it is, its state, and whether it can serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from lucid_compute.agent.runtimes.detection import CERTAIN, Detection, detect
from lucid_compute.agent.runtimes.inference_server import HEALTH_DEADLINE_SECONDS, InferenceServer, ServerResponse
from lucid_compute.agent.runtimes.reading import NOTHING_READ, ServerReading

DETECT_AGAIN_SECONDS = 300.0
DOUBT_SECONDS = 30.0  # while the detection is not certain
SILENCES_UNTIL_DEAD = 2  # a server that is busy may miss one deadline
_BAD_REQUEST = 400
_FIRST_SERVER_FAULT = 500
_KEYS_WANTED = frozenset({401, 403})
_log = logging.getLogger(__name__)


class Observation(NamedTuple):
    """The server at `seen_at`. `fault` is why it can't serve, in a sentence; None: it can serve."""

    seen_at: float
    detection: Detection | None
    reading: ServerReading
    fault: str | None


class ServerWatch:
    """Observes the server, one observation at a time. Each one ends within seconds, whatever the server does."""

    def __init__(self, server: InferenceServer, clock: Callable[[], float]) -> None:
        self._server = server
        self._clock = clock
        self._detection: Detection | None = None
        self._detected_at = 0.0
        self._progress = StallDetector()
        self._silences = 0
        self._was_away = False
        self._is_strange = False

    async def observe(self) -> Observation:
        """Return the state of the server now."""
        if self._is_detection_due():
            await self._detect()
        if self._detection is None:
            return Observation(self._clock(), None, NOTHING_READ, await self._why_unknown())
        health, reading = await self._read(self._detection)
        if self._was_away and health.is_ok:
            await self._detect(forgets=True)  # what came back may be another server
            health, reading = await self._read(self._detection)
        self._was_away = not health.is_ok
        now = self._clock()
        self._progress.note(reading, now)
        return Observation(now, self._detection, reading, self._fault(self._detection, health, reading, now))

    async def _read(self, detection: Detection) -> tuple[ServerResponse, ServerReading]:
        return await asyncio.gather(
            self._server.get(detection.runtime.health_path, HEALTH_DEADLINE_SECONDS),
            detection.runtime.read(self._server),
        )

    def _is_detection_due(self) -> bool:
        """Return whether to detect the runtime: it is unknown, its answers do not fit it, or it is time."""
        if self._detection is None or self._is_strange:
            return True
        is_certain = self._detection.confidence == CERTAIN
        wait_seconds = DETECT_AGAIN_SECONDS if is_certain else DOUBT_SECONDS
        return not self._was_away and self._clock() - self._detected_at >= wait_seconds

    async def _detect(self, *, forgets: bool = False) -> None:
        """Detect the runtime. A less certain result changes nothing, unless the known runtime is forgotten."""
        found, known = await detect(self._server), self._detection
        self._detected_at = self._clock()
        if found is None:
            return
        is_same = known is not None and _is_same(found, known)
        if is_same or (known is not None and found.confidence < known.confidence and not forgets):
            return
        _log.info(
            "%s is %s %s (confidence %.1f: %s)",
            self._server.url,
            found.shown_name,
            found.runtime.version or "of unknown version",
            found.confidence,
            "; ".join(found.evidence),
        )
        self._detection, self._progress = found, StallDetector()

    async def _why_unknown(self) -> str:
        answer = await self._server.get("/v1/models")
        if answer.fault:
            return f"the inference server {answer.fault}"
        return f"the inference server is none that is known: it answers {answer.status} to /v1/models"

    def _fault(self, detection: Detection, health: ServerResponse, reading: ServerReading, now: float) -> str | None:
        name = detection.runtime.name or "the inference server"
        if (fault := self._health_fault(name, health)) is not None:
            return fault
        if reading.not_ready is not None:
            return reading.not_ready
        if self._progress.is_wedged(now):
            return (
                f"{name} is wedged: {reading.running or 'some'} requests run, and it has generated nothing for "
                f"{WEDGED_AFTER_SECONDS:.0f} s or more"
            )
        return None

    def _health_fault(self, name: str, health: ServerResponse) -> str | None:
        """Return what is wrong with the health check. Silence counts only when it lasts."""
        self._silences = self._silences + 1 if health.fault else 0
        self._is_strange = _BAD_REQUEST <= health.status < _FIRST_SERVER_FAULT
        if health.fault:
            return f"{name} {health.fault}" if health.is_refused or self._silences >= SILENCES_UNTIL_DEAD else None
        if health.status in _KEYS_WANTED:
            return f"{name} refuses the agent ({health.status}): give it the server's key with --inference-key"
        return None if health.is_ok else f"{name} answers {health.status} to its health check"


def _is_same(found: Detection, known: Detection) -> bool:
    is_same = type(found.runtime) is type(known.runtime) and found.runtime.version == known.runtime.version
    return is_same and found.confidence <= known.confidence


WEDGED_AFTER_SECONDS = 60.0


class StallDetector:
    """Compares readings to find a server that runs requests without progress.

    What a reading does not contain changes nothing: a wedged server may stop answering /metrics.
    """

    def __init__(self) -> None:
        self._progress: tuple[float, ...] | None = None
        self._still_since: float | None = None

    def note(self, reading: ServerReading, now: float) -> None:
        """Take a reading, made at `now`, into account."""
        if reading.running == 0:
            self._still_since = None
        elif reading.progress is not None and reading.progress != self._progress:
            self._progress, self._still_since = reading.progress, now if reading.running else None
        elif reading.running and reading.progress is not None and self._still_since is None:
            self._still_since = now

    def still_seconds(self, now: float) -> float:
        """Return for how many seconds requests have run without progress."""
        return 0.0 if self._still_since is None else now - self._still_since

    def is_wedged(self, now: float) -> bool:
        """Return whether that has been too long."""
        return self.still_seconds(now) >= WEDGED_AFTER_SECONDS
