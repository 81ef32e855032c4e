"""Which jobs are looked for, and the WHERE clause that finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, ColumnElement, and_, literal_column, true

from lucid_compute.jobs import Outcome
from lucid_compute.storage.tables import JOB_IS_FAULT, jobs

# Literals, as in the indexes that hold only such rows.
IS_OPEN: ColumnElement[bool] = literal_column("(outcome IN ('running', 'lost'))", Boolean)
_IS_FAULT: ColumnElement[bool] = literal_column(f"({JOB_IS_FAULT})", Boolean)

UNFINISHED = (Outcome.RUNNING, Outcome.LOST)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What is looked for; None looks for anything. From `since` on, before `until`; models by ids, perhaps none."""

    owner: str | None = None
    node_id: str | None = None
    outcome: Outcome | None = None
    model_ids: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_summed(self) -> bool:
        """Whether the sums tell how many there are, without counting rows."""
        return (self.model_ids, self.since, self.until) == (None, None, None)

    def condition(self) -> ColumnElement[bool]:
        """Answer the WHERE clause over `jobs`."""
        conditions: list[ColumnElement[bool]] = [self.scope(jobs.c)]
        if self.outcome is not None:
            conditions.append(jobs.c.outcome == self.outcome.value)
            if self.outcome is not Outcome.COMPLETED:
                conditions.append(_IS_FAULT)
            if self.outcome in UNFINISHED:
                conditions.append(IS_OPEN)
        if self.model_ids is not None:
            conditions.append(jobs.c.model_id.in_(self.model_ids))
        if self.since is not None:
            conditions.append(jobs.c.started_at >= self.since)
        if self.until is not None:
            conditions.append(jobs.c.started_at < self.until)
        return and_(*conditions)

    def scope(self, columns: Any) -> ColumnElement[bool]:
        """Answer the WHERE clause over `jobs` or `job_totals` that says whose they are."""
        conditions: list[ColumnElement[bool]] = [true()]
        if self.owner is not None:
            conditions.append(columns.node_owner == self.owner)
        if self.node_id is not None:
            conditions.append(columns.node_id == self.node_id)
        return and_(*conditions)
