"""Work that is counted, so that no test depends on how fast a machine is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], object]) -> int:
    """Return how many calls of functions, of Python and of C, `work` makes."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    with _no_collection():
        previous = sys.getprofile()
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(previous)
    return count


def lines_of(work: Callable[[], object]) -> int:
    """Return how many lines of Python `work` runs."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return trace

    with _no_collection():
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(previous)
    return count


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector still: it may run at any line, and the callbacks that it makes would be counted."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
