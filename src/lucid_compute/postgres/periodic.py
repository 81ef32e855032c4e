"""Periodic background work. A failed run is logged; the next run catches up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lucid_compute.errors import DatabaseUnavailable

_log = logging.getLogger(__name__)


async def run_periodically(work: Callable[[], Awaitable[object]], *, every_seconds: float, failed: str) -> None:
    """Call `work` every `every_seconds` until this task is cancelled; log `failed` and the traceback when it raises."""
    while True:
        await asyncio.sleep(every_seconds)
        try:
            await work()
        except DatabaseUnavailable:
            continue  # an outage is logged elsewhere
        except Exception:  # noqa: BLE001 - a fault must not end this task; its traceback is logged
            _log.exception(failed)
