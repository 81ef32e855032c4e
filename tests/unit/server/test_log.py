"""The log of the service: one line a record, and no client that can flood it."""

from __future__ import annotations

import io
import json
import logging

from lucid_compute.server.logging import LINES_A_PERIOD, MAX_EXCEPTION_CHARACTERS, PERIOD_SECONDS, FloodGuard, JsonLines


class Log:
    """A log in memory, with a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self._text = io.StringIO()
        handler = logging.StreamHandler(self._text)
        handler.setFormatter(JsonLines())
        handler.addFilter(FloodGuard(lambda: self.now))
        self.logger = logging.Logger("test")  # noqa: LOG001 - of this test alone
        self.logger.addHandler(handler)

    @property
    def lines(self) -> list[dict[str, object]]:
        """Return what was written."""
        return [json.loads(line) for line in self._text.getvalue().splitlines()]


def test_one_place_can_not_flood_the_log() -> None:
    """Other places write on."""
    log = Log()
    for number in range(1000):
        log.logger.warning("request %d failed", number)
    assert len(log.lines) == LINES_A_PERIOD
    log.logger.warning("something else")
    assert log.lines[-1]["message"] == "something else"


def test_what_was_left_out_is_counted_in_the_next_line() -> None:
    """Once."""
    log = Log()

    def write() -> None:
        log.logger.warning("a line")

    for _ in range(LINES_A_PERIOD + 7):
        write()
    log.now += PERIOD_SECONDS
    write()
    write()
    assert [line.get("leftOut") for line in log.lines[-2:]] == [7, None]


def test_a_long_traceback_loses_its_middle() -> None:
    """Its beginning and its end say what happened."""
    log = Log()
    try:
        raise ValueError("first" + "x" * 10 * MAX_EXCEPTION_CHARACTERS + "last")
    except ValueError:
        log.logger.exception("failed")
    text = str(log.lines[0]["exception"])
    assert len(text) < MAX_EXCEPTION_CHARACTERS + 100
    assert text.startswith("Traceback")
    assert text.endswith("last")
