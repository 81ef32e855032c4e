"""Work that is done again and again and can wait: a round that fails leaves it to the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lucid_compute.errors import DatabaseUnavailable

_log = logging.getLogger(__name__)


async def make_rounds(work: Callable[[], Awaitable[object]], *, every_seconds: float, failed: str) -> None:
    """Do the work every so many seconds, for as long as this task runs; `failed` is logged when it fails."""
    while True:
        await asyncio.sleep(every_seconds)
        try:
            await work()
        except DatabaseUnavailable:
            continue  # it says so itself
        except Exception:  # noqa: BLE001 - a fault must end neither this task nor the service; its trace is logged
            _log.exception(failed)
