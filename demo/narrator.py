"""What the demo says, as it happens: each line with the time since the start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


class Narrator:
    """Writes lines to stdout. When nobody reads any more, it says so and falls silent."""

    def __init__(self, on_closed: Callable[[], None]) -> None:
        """Start the clock; `on_closed` is called once, when the reader has gone."""
        self._began_at = time.monotonic()
        self._on_closed = on_closed
        self._has_reader = True

    @property
    def seconds(self) -> float:
        """Return how long ago the demo began."""
        return time.monotonic() - self._began_at

    def tell(self, sentence: str) -> None:
        """Say what just happened."""
        minutes, seconds = divmod(int(self.seconds), 60)
        self.show(f"{minutes:02}:{seconds:02}  {sentence}")

    def show(self, text: str = "") -> None:
        """Write something that belongs to no moment."""
        if not self._has_reader:
            return
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except OSError:  # as with `| head`
            self._has_reader = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered
            self._on_closed()
