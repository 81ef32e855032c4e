"""What a record keeps of a span of time, column by column, and how two records become one: in SQL, made here.

A record is a row of sums over jobs (`job_…`) or over samples of heartbeats (`gauge_…`) by its bucket, the start of a
minute, an hour or a day. Records are added up when a replica writes them, when minutes become hours, and when they are
read, always by these rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

UPSTREAM = "00000000-0000-0000-0000-000000000000"
"""Stands for the node of jobs that an upstream served, and for the model of records of all models together."""

ALL_NODES = "ffffffff-ffff-ffff-ffff-ffffffffffff"
"""The scope of records of everything; an owner's is `owner_scope`, a node's is its id."""


class Merge(Enum):
    """How two values of a column become one; null is unknown, and gives way to what is known."""

    SUM = "sum"
    MAX = "max"
    SPREAD = "spread"  # a histogram: each element holds a bucket in its high bits and a count in its low ones
    FAULTS = "faults"  # an object of counts by outcome and reason


class Width(NamedTuple):
    """How a histogram's elements are kept: the array's type, the bits of a count, and where counts stop."""

    type: str
    bits: int

    @property
    def most(self) -> int:
        """The largest count of one element."""
        return (1 << self.bits) - 1


NARROW = Width("integer", 22)  # of a minute: 4 million of one bucket, and half the room
WIDE = Width("bigint", 48)


LOOSE_PLACES = 48
"""A histogram that is longer than this is put in order when something is added to it."""


class RecordColumn(NamedTuple):
    """One column: its type in the records of a minute, and in longer ones."""

    name: str
    merge: Merge
    type: str
    long_type: str

    def sql_type(self, width: Width) -> str:
        """Return the type in records whose histograms are so wide."""
        return self.type if width is NARROW else self.long_type


JOB_COLUMNS = (
    *(
        RecordColumn(name, Merge.SUM, "integer", "bigint")
        for name in ("completed", "failed", "rejected", "cancelled", "priced")
    ),
    *(
        RecordColumn(name, Merge.SUM, "bigint", "bigint")
        for name in ("latency_us", "first_byte_us", "tokens_in", "tokens_out")
    ),
    RecordColumn("revenue_usd", Merge.SUM, "numeric", "numeric"),
    RecordColumn("spread", Merge.SPREAD, "integer[]", "bigint[]"),
    RecordColumn("faults", Merge.FAULTS, "jsonb", "jsonb"),
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
    RecordColumn("samples", Merge.SUM, "integer", "bigint"),
    *(RecordColumn(f"{name}_sum", Merge.SUM, "real", "double precision") for name in GAUGES),
    *(RecordColumn(f"{name}_max", Merge.MAX, "real", "real") for name in GAUGES),
    *(RecordColumn(f"{name}_count", Merge.SUM, "integer", "bigint") for name in GAUGES),
)


def names(columns: Iterable[RecordColumn]) -> str:
    """Return the columns' names, as a list in SQL."""
    return ", ".join(column.name for column in columns)


def add_up(columns: tuple[RecordColumn, ...], keys: str, *, source: str, into: str, from_: Width, to: Width) -> str:
    """Return CTEs that end in one called `into`: the rows of the relation `source` added up by `keys`.

    Each row's histogram is as wide as `from_` says, those that come out as `to` says.
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


def add_to_held(columns: tuple[RecordColumn, ...], width: Width) -> str:
    """Return the SET clause of an upsert into `… AS held` that adds what comes to what is there."""
    return ", ".join(f"{column.name} = {_added(column, width)}" for column in columns)


def owner_scope(owner: str) -> str:
    """Answer, in SQL, the scope of an owner whose name `owner` is in SQL."""
    return f"md5('owner:' || {owner})::uuid"


def _added(column: RecordColumn, width: Width) -> str:
    held, new = f"held.{column.name}", f"excluded.{column.name}"
    if column.merge is Merge.MAX:
        return f"greatest({held}, {new})"
    if column.merge is Merge.SUM:
        return f"coalesce({held} + {new}, {held}, {new})"
    if column.merge is Merge.SPREAD:
        grouped = f"SELECT {_counted(width, width)} AS e FROM unnest({held} || {new}) v GROUP BY v >> {width.bits}"
        whole = f"SELECT array_agg(e) FROM ({grouped}) s"
        # A bucket may stand twice, and is added up when it is read: doing it here each time costs more than the rest.
        merged = f"SELECT CASE WHEN cardinality({held}) < {LOOSE_PLACES} THEN {held} || {new} ELSE ({whole}) END"
    else:
        both = f"SELECT * FROM jsonb_each_text({held}) UNION ALL SELECT * FROM jsonb_each_text({new})"
        counted = f"SELECT b.key, sum(b.value::bigint) AS n FROM ({both}) b GROUP BY b.key"
        merged = f"SELECT jsonb_object_agg(s.key, s.n) FROM ({counted}) s"
    return f"CASE WHEN {held} IS NULL THEN {new} WHEN {new} IS NULL THEN {held} ELSE ({merged}) END"


def _counted(from_: Width, to: Width) -> str:
    """Return the element that stands for all `v` of one place of a histogram."""
    count = f"least(sum(v & {from_.most}), {to.most})::{to.type}"
    return f"((v >> {from_.bits})::{to.type} << {to.bits} | {count})"
