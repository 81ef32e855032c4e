"""The log: one JSON object in each line on standard error. No client can flood it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

MAX_EXCEPTION_CHARACTERS = 16_000
LINES_A_PERIOD = 50  # from one place in the code
PERIOD_SECONDS = 10.0


class JsonLines(logging.Formatter):
    """Writes a record as one line; line breaks and control characters in it are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if (request_id := getattr(record, "request_id", None)) is not None:
            line["requestId"] = request_id
        if left_out := getattr(record, "left_out", 0):
            line["leftOut"] = left_out
        if record.exc_info:
            line["exception"] = _shorten(self.formatException(record.exc_info))
        return json.dumps(line)


class FloodGuard(logging.Filter):
    """Leaves out lines of a place in the code that has just written LINES_A_PERIOD; the next one says how many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._period = 0
        self._written: dict[tuple[str, int], int] = {}
        self._left_out: dict[tuple[str, int], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        if (period := int(self._clock() // PERIOD_SECONDS)) != self._period:
            self._period, self._written = period, {}
        place = record.pathname, record.lineno
        self._written[place] = self._written.get(place, 0) + 1
        if self._written[place] > LINES_A_PERIOD:
            self._left_out[place] = self._left_out.get(place, 0) + 1
            return False
        if left_out := self._left_out.pop(place, 0):
            record.left_out = left_out
        return True


def configure_log(level: str) -> None:
    """Log our own messages from `level` on, and those of libraries from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(FloodGuard())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("lucid_compute").setLevel(level)


def _shorten(text: str) -> str:
    """Return a traceback without its middle if it is long: chained exceptions repeat themselves."""
    if len(text) <= MAX_EXCEPTION_CHARACTERS:
        return text
    half = MAX_EXCEPTION_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
