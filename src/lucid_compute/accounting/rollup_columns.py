"""The columns of rollups, and the SQL that adds rollups up.

A rollup is a row of sums of jobs (`job_…`) or of heartbeats' samples (`gauge_…`). Its `bucket` is the start of a
minute, an hour or a day. Rollups are added up when a replica writes them, when minutes become hours, and when they are
read, always by the rules of this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

UPSTREAM = "00000000-0000-0000-0000-000000000000"
"""The node of jobs that an upstream served, and the model of rollups of all models together."""

ALL_NODES = "ffffffff-ffff-ffff-ffff-ffffffffffff"
"""The scope of rollups of everything. An owner's scope is `owner_scope`, a node's is its id."""


class Merge(Enum):
    """How two values of a column are merged. Null is unknown: a known value replaces it."""

    SUM = "sum"
    MAX = "max"
    SPREAD = "spread"  # a histogram: the high bits of an element are the bucket, the low bits the count
    FAULTS = "faults"  # an object of counts by outcome and reason


class Width(NamedTuple):
    """The layout of a histogram's elements: the array's type, and the number of bits of a count."""

    type: str
    bits: int

    @property
    def most(self) -> int:
        """The highest count of one element; counts stop there."""
        return (1 << self.bits) - 1


NARROW = Width("integer", 22)  # of a minute: up to 4 million in one bucket, in half the space
WIDE = Width("bigint", 48)


MAX_UNMERGED_ELEMENTS = 48
"""A longer histogram is merged when something is added to it; a shorter one may have a bucket twice."""


class RollupColumn(NamedTuple):
    """One column: its name, merge rule, and type in rollups of a minute and in longer ones."""

    name: str
    merge: Merge
    type: str
    long_type: str

    def sql_type(self, width: Width) -> str:
        """Return the column's type in rollups whose histograms have this width."""
        return self.type if width is NARROW else self.long_type


JOB_COLUMNS = (
    *(
        RollupColumn(name, Merge.SUM, "integer", "bigint")
        for name in ("completed", "failed", "rejected", "cancelled", "priced")
    ),
    *(
        RollupColumn(name, Merge.SUM, "bigint", "bigint")
        for name in ("latency_us", "first_byte_us", "tokens_in", "tokens_out")
    ),
    RollupColumn("revenue_usd", Merge.SUM, "numeric", "numeric"),
    RollupColumn("spread", Merge.SPREAD, "integer[]", "bigint[]"),
    RollupColumn("faults", Merge.FAULTS, "jsonb", "jsonb"),
)
JOB_COUNTS = ("completed", "failed", "rejected", "cancelled", "priced")

GAUGES = (
    "load",
    "queue_depth",
    "in_flight",
    "reported_in_flight",
    "gpu_utilization",
    "gpu_memory_used_mb",
    "gpu_memory_total_mb",
)
GAUGE_COLUMNS = (
    RollupColumn("samples", Merge.SUM, "integer", "bigint"),
    *(RollupColumn(f"{name}_sum", Merge.SUM, "real", "double precision") for name in GAUGES),
    *(RollupColumn(f"{name}_max", Merge.MAX, "real", "real") for name in GAUGES),
    *(RollupColumn(f"{name}_count", Merge.SUM, "integer", "bigint") for name in GAUGES),
)


def names(columns: Iterable[RollupColumn]) -> str:
    """Return the columns' names as an SQL list."""
    return ", ".join(column.name for column in columns)


def add_up(columns: tuple[RollupColumn, ...], keys: str, *, source: str, into: str, from_: Width, to: Width) -> str:
    """Return CTEs; the last one, `into`, has the rows of the relation `source` added up by `keys`.

    `from_` is the width of the source's histograms, `to` that of the result's.
    """
    sums = ", ".join(
        f"{column.merge.value}({column.name})::{column.sql_type(to)} AS {column.name}"
        for column in columns
        if column.merge in {Merge.SUM, Merge.MAX}
    )
    steps = [f"{into}_sums AS (SELECT {keys}, {sums} FROM {source} GROUP BY {keys})"]
    joined = f"{into}_sums"
    for column in columns:
        if column.merge is Merge.SPREAD:
            inner = f"SELECT {keys}, {_counted(from_, to)} AS element FROM {source}, unnest(spread) v"
            grouped = f"{inner} GROUP BY {keys}, v >> {from_.bits}"
            array = f"SELECT {keys}, array_agg(element) AS spread FROM ({grouped}) e GROUP BY {keys}"
            steps.append(f"{into}_spreads AS ({array})")
            joined += f" LEFT JOIN {into}_spreads USING ({keys})"
        elif column.merge is Merge.FAULTS:
            inner = f"SELECT {keys}, f.key AS fault, sum(f.value::bigint) AS n FROM {source}, jsonb_each_text(faults) f"
            grouped = f"{inner} GROUP BY {keys}, f.key"
            whole = f"SELECT {keys}, jsonb_object_agg(fault, n) AS faults FROM ({grouped}) f GROUP BY {keys}"
            steps.append(f"{into}_faults AS ({whole})")
            joined += f" LEFT JOIN {into}_faults USING ({keys})"
    steps.append(f"{into} AS (SELECT {keys}, {names(columns)} FROM {joined})")
    return ", ".join(steps)


def add_to_held(columns: tuple[RollupColumn, ...], width: Width) -> str:
    """Return the SET clause of an upsert into `… AS held` that adds the new row to the stored one."""
    return ", ".join(f"{column.name} = {_added(column, width)}" for column in columns)


def owner_scope(owner: str) -> str:
    """Return the SQL expression of an owner's scope; `owner` is the SQL expression of the owner's name."""
    return f"md5('owner:' || {owner})::uuid"


def _added(column: RollupColumn, width: Width) -> str:
    held, new = f"held.{column.name}", f"excluded.{column.name}"
    if column.merge is Merge.MAX:
        return f"greatest({held}, {new})"
    if column.merge is Merge.SUM:
        return f"coalesce({held} + {new}, {held}, {new})"
    if column.merge is Merge.SPREAD:
        grouped = f"SELECT {_counted(width, width)} AS e FROM unnest({held} || {new}) v GROUP BY v >> {width.bits}"
        whole = f"SELECT array_agg(e) FROM ({grouped}) s"
        # A bucket may be there twice until it is read: merging each time would cost more than all the rest.
        merged = (
            f"SELECT CASE WHEN cardinality({held}) < {MAX_UNMERGED_ELEMENTS} THEN {held} || {new} ELSE ({whole}) END"
        )
    else:
        both = f"SELECT * FROM jsonb_each_text({held}) UNION ALL SELECT * FROM jsonb_each_text({new})"
        counted = f"SELECT b.key, sum(b.value::bigint) AS n FROM ({both}) b GROUP BY b.key"
        merged = f"SELECT jsonb_object_agg(s.key, s.n) FROM ({counted}) s"
    return f"CASE WHEN {held} IS NULL THEN {new} WHEN {new} IS NULL THEN {held} ELSE ({merged}) END"


def _counted(from_: Width, to: Width) -> str:
    """Return the element that is the sum of all elements `v` of one bucket."""
    count = f"least(sum(v & {from_.most}), {to.most})::{to.type}"
    return f"((v >> {from_.bits})::{to.type} << {to.bits} | {count})"
