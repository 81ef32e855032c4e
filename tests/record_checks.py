"""The reconciliation of rollups: minutes, hours and days against the ledger's rows, counted one by one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from lucid_compute.accounting.rollup_columns import ALL_NODES, NARROW, UPSTREAM, WIDE, owner_scope
from tests.ledger import ENDED_ROWS, add_rollup, read, sums_of


async def expect_tiers(url: str) -> None:
    """Fail unless minutes, hours and days, each with open rollups, equal the ledger's rows."""
    rows = await read(url, ENDED_ROWS)
    owners = await _scopes_of(url, {row["node_owner"] for row in rows if row["node_owner"]})
    marks = (await read(url, "SELECT * FROM record_marks"))[0]
    still_open = await read(url, "SELECT * FROM job_open")
    for tier, span, width, until in (
        ("minutes", "minute", NARROW, None),
        ("hours", "hour", WIDE, marks["hours_until"]),
        ("days", "day", WIDE, marks["days_until"]),
    ):
        expected: dict[Any, list[Any]] = {}
        for row in rows:
            bucket = _floor(row["started_at"], span)
            if until is None or bucket < until:
                for scope, model in _keys(row, owners):
                    expected.setdefault((bucket, scope, model), []).append(row)
        stored: dict[Any, Any] = {}
        is_whole = "true" if tier == "minutes" or marks[f"{tier}_part"] is None else f"bucket < '{until}'"
        for row in await read(url, f"SELECT * FROM job_{tier} WHERE {is_whole}"):  # else a part of the next is there
            key = (row["bucket"], str(row["scope_id"]), str(row["model_id"]))
            add_rollup(stored.setdefault(key, {}), row, width)
        for row in still_open:
            bucket = _floor(row["bucket"], span)
            if until is None or bucket < until:
                for scope, model in _keys(row, owners):
                    add_rollup(stored.setdefault((bucket, scope, model), {}), row)
        assert stored.keys() == expected.keys(), tier
        for key, jobs in expected.items():
            assert stored[key] == sums_of(jobs), (tier, key)


def _keys(row: Any, owners: dict[str, str]) -> Iterable[tuple[str, str]]:
    model = str(row["model_id"])
    yield str(row["node_id"] or UPSTREAM), model
    for scope in (ALL_NODES, *([owners[row["node_owner"]]] if row["node_owner"] else [])):
        yield from ((scope, model), (scope, UPSTREAM))


def _floor(instant: datetime, span: str) -> datetime:
    floored = instant.replace(second=0, microsecond=0)
    if span != "minute":
        floored = floored.replace(minute=0)
    return floored.replace(hour=0) if span == "day" else floored


async def _scopes_of(url: str, owners: Iterable[str]) -> dict[str, str]:
    """Return the scope of each owner."""
    return {owner: str((await read(url, f"SELECT {owner_scope('$1::text')}", owner))[0][0]) for owner in owners}
