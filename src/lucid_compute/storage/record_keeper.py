"""Moves records on, one replica at a time: minutes that are over, then hours and days, then what is kept no longer."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from lucid_compute.storage.database import is_passing
from lucid_compute.storage.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.storage.node_states import CLEAN_STATES
from lucid_compute.storage.record_sql import (
    CLEAN_DAYS,
    CLEAN_FLUSHES,
    CLEAN_HOURS,
    CLEAN_MINUTES,
    DAYS_ARE_DONE,
    HOURS_ARE_DONE,
    HOURS_UNTIL,
    JOIN_BY_HASH,
    KINDS,
    NEXT_DAY,
    NEXT_HOUR,
)
from lucid_compute.timeline import EPOCH

KEEP_SECONDS = 20.0
CLEANING_SECONDS = 60.0
ROUND_SECONDS = 300.0  # adding an hour of ten thousand busy nodes up takes twenty
ROWS_A_MOVE = 100_000  # some four seconds; what a fleet of ten thousand leaves in a minute, or in ten of them
RECORDS_LOCK = 0x7265636F  # an advisory lock of our own: "reco"
MINUTE_IS_OVER_AFTER = timedelta(minutes=1)  # what comes even later is moved later
HOUR_IS_OVER_AFTER = timedelta(minutes=3)

_log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """How long records are kept: by the minute in hours, by the hour and by the day in days."""

    minutes_hours: int
    hours_days: int
    days_days: int


class RecordKeeper:
    """Keeps the records of all replicas in order, while no other replica does."""

    def __init__(self, url: str, retention: Retention, *, rows_a_move: int = ROWS_A_MOVE) -> None:
        """Keep those of the database at `url`."""
        self._connection = DedicatedConnection(url, Purpose.RECORD_KEEPER, session=JOIN_BY_HASH)
        self._retention = retention
        self._rows_a_move = rows_a_move

    async def run(self) -> None:
        """Keep them for as long as this task runs."""
        cleaning_due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                is_cleaning = loop.time() >= cleaning_due
                await self.keep(cleans=is_cleaning)
                if is_cleaning:
                    cleaning_due = loop.time() + CLEANING_SECONDS
            except Exception as error:  # noqa: BLE001 - a fault must not end the task: the next round does what this left
                if not is_passing(error):
                    _log.exception("the records could not be moved on, and wait")

    async def keep(self, *, cleans: bool = True, now: datetime | None = None) -> None:
        """Move on what is due at `now`, the database's unless named; does nothing while another replica does it."""
        try:
            async with self._connection.within(ROUND_SECONDS) as connection:
                if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", RECORDS_LOCK):
                    return
                await self._keep(connection, now or await connection.fetchval("SELECT now()"))
                if cleans:
                    await self._clean(connection)
        finally:
            await self._connection.close()  # and with it the lock

    async def _keep(self, connection: asyncpg.Connection[asyncpg.Record], now: datetime) -> None:
        over_before = (now - MINUTE_IS_OVER_AFTER).replace(second=0, microsecond=0)
        for kind in KINDS:
            while await connection.fetchval(kind.move, over_before, self._rows_a_move) == self._rows_a_move:
                pass
        await self._add_up_hours(connection, (now - HOUR_IS_OVER_AFTER).replace(minute=0, second=0, microsecond=0))
        await self._add_up_days(connection, (await connection.fetchval(HOURS_UNTIL)).replace(hour=0))

    async def _add_up_hours(self, connection: asyncpg.Connection[asyncpg.Record], until: datetime) -> None:
        """Add up every whole hour before `until`, each in a transaction that also says that it is done."""
        while (hour := await connection.fetchval(NEXT_HOUR, until)) is not None:
            async with connection.transaction():
                for kind in KINDS:
                    await connection.execute(kind.add_up_hour, hour)
                await connection.execute(HOURS_ARE_DONE, hour + timedelta(hours=1))
        await connection.execute(HOURS_ARE_DONE, until)

    async def _add_up_days(self, connection: asyncpg.Connection[asyncpg.Record], until: datetime) -> None:
        while (day := await connection.fetchval(NEXT_DAY, until)) is not None:
            async with connection.transaction():
                for kind in KINDS:
                    await connection.execute(kind.add_up_day, day)
                await connection.execute(DAYS_ARE_DONE, day + timedelta(days=1))
        await connection.execute(DAYS_ARE_DONE, until)

    async def _clean(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Delete what is kept no longer, part by part, for a tenth of the time at most; the next time goes on."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CLEANING_SECONDS / 10
        for cleanings, kept in zip((CLEAN_MINUTES, CLEAN_HOURS, CLEAN_DAYS), self._retention, strict=True):
            for cleaning in cleanings:
                since = EPOCH
                while loop.time() < until:
                    before = await connection.fetchval(cleaning.find, kept, since)
                    if await connection.execute(cleaning.delete, before, since) == "DELETE 0":
                        break
                    since = before
        await connection.execute(CLEAN_STATES, self._retention.hours_days)
        await connection.execute(CLEAN_FLUSHES)
