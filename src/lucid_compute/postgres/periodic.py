"""Periodic work in the background. A run that fails is logged, and the next run makes up for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lucid_compute.errors import DatabaseUnavailable

_log = logging.getLogger(__name__)


async def run_periodically(work: Callable[[], Awaitable[object]], *, every_seconds: float, failed: str) -> None:
    """Call `work` every `every_seconds` until this task is cancelled; log `failed` and the trace when it raises."""
    while True:
        await asyncio.sleep(every_seconds)
        try:
            await work()
        except DatabaseUnavailable:
            continue  # an outage is logged elsewhere
        except Exception:  # noqa: BLE001 - a fault must end neither this task nor the service; its trace is logged
            _log.exception(failed)
