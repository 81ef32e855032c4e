"""The budgets of keys: what is spent of them, read from the ledger's sums once a second while the keys are used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.key_limits import BudgetPeriod, require_budget

EVERY_SECONDS = 1.0
FORGET_AFTER_SECONDS = 60.0
_NOTHING = Decimal(0)
_log = logging.getLogger(__name__)

SpentReader = Callable[[Sequence[str], datetime], Awaitable[dict[str, Decimal]]]
"""Returns what the requests of each key have cost that started at this instant or later; keys without any may miss."""


class _Spent:
    """What a key has spent since the start of its budget's period, and when a request last asked for it."""

    __slots__ = ("asked_at", "since", "usd")

    def __init__(self, since: datetime, usd: Decimal, asked_at: float) -> None:
        self.since = since
        self.usd = usd
        self.asked_at = asked_at


class KeyBudgets:
    """Refuses the requests of keys whose budget is spent.

    What a request costs is known when it ends, and is read within a second. So a key may exceed its budget by what its
    requests of that second cost, and those that run. While the database is away the last known sums decide.
    """

    def __init__(self, read_spent: SpentReader, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._read_spent = read_spent
        self._clock = clock
        self._spent: dict[tuple[str, BudgetPeriod], _Spent] = {}

    def admit(self, principal: Principal, now: datetime) -> bool:
        """Return True if the key's budget is not spent, False if `ask` must be awaited before this is called again.

        Raises:
            BudgetExceeded: the budget is spent.
        """
        limits = principal.limits
        if limits is None or limits.budget_period is None:
            return True
        spent = self._spent.get((principal.key_id, limits.budget_period))
        if spent is None or spent.since < limits.budget_period.starts_at(now):
            return False
        spent.asked_at = self._clock()
        require_budget(limits, spent.usd, now)
        return True

    async def ask(self, principal: Principal, now: datetime) -> None:
        """Read what the key has spent in the period that contains `now`.

        Raises:
            DatabaseUnavailable: the database does not say.
        """
        if principal.limits is not None and principal.limits.budget_period is not None:
            period = principal.limits.budget_period
            await self._read([principal.key_id], period, period.starts_at(now))

    async def run(self) -> None:
        """Read the sums again once a second, until this task is cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                with suppress(DatabaseUnavailable):
                    await self.refresh()
            except Exception:  # noqa: BLE001 - a fault must not end the task; its trace is logged
                _log.exception("what keys have spent could not be read")

    async def refresh(self) -> None:
        """Read the sums of the keys that were used in the last minute, and forget the others.

        Raises:
            DatabaseUnavailable: the database does not say.
        """
        until = self._clock() - FORGET_AFTER_SECONDS
        self._spent = {key: spent for key, spent in self._spent.items() if spent.asked_at >= until}
        groups: defaultdict[tuple[BudgetPeriod, datetime], list[str]] = defaultdict(list)
        for (key_id, period), spent in self._spent.items():
            groups[period, spent.since].append(key_id)
        for (period, since), key_ids in groups.items():
            await self._read(key_ids, period, since)

    async def _read(self, key_ids: Sequence[str], period: BudgetPeriod, since: datetime) -> None:
        found = await self._read_spent(key_ids, since)
        for key_id in key_ids:
            known = self._spent.get((key_id, period))
            if known is not None and known.since > since:
                continue  # a request of the next period was faster
            asked_at = self._clock() if known is None or known.since < since else known.asked_at
            self._spent[key_id, period] = _Spent(since, found.get(key_id, _NOTHING), asked_at)
