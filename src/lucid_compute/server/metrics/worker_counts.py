"""What one worker counted and measured, in a form that workers show each other and that adds up. Pure.

Counts only grow, and are kept when a worker ends; what is measured counts only while its worker lives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lucid_compute.gateway.request_metrics import MAX_MODELS, OTHER

MODELS = "models"  # the one of the tallies whose labels owners choose
LIVE_SECONDS = 5.0
SUMMED = frozenset(
    {
        "lucid_inference_running",
        "lucid_jobs_waiting",
        "lucid_loop_tasks",
        "lucid_webhook_deliveries_running",
        "lucid_workers",
    }
)
"""Of these the workers' are added up; of all others the greatest counts."""

Labels = tuple[str, ...]
Tally = dict[Labels, list[float]]


@dataclass
class WorkerCounts:
    """The tallies by name, each a list of numbers by labels; the gauges; when each model was first named; as of when.

    Instants are the monotonic clock's, which the workers of a machine share.
    """

    at: float
    tallies: dict[str, Tally] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    named_at: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Write them down."""
        tallies = {
            name: [[*labels, numbers] for labels, numbers in tally.items()] for name, tally in self.tallies.items()
        }
        return json.dumps([self.at, tallies, self.gauges, self.named_at], separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> WorkerCounts:
        """Read what `to_bytes` wrote."""
        at, tallies, gauges, named_at = json.loads(text)
        read = {name: {tuple(row[:-1]): row[-1] for row in rows} for name, rows in tallies.items()}
        return cls(at, read, gauges, named_at)


def merge(parts: Iterable[WorkerCounts], now: float) -> WorkerCounts:
    """Return what all counted together, and what those that live measure; it has as few models as one of them.

    Of models the first that were named keep their names. Who was named stays so, because later ones come behind.
    """
    merged = WorkerCounts(now)
    measured: dict[str, list[float]] = {}
    for part in parts:
        for name, tally in part.tallies.items():
            _add(merged.tallies.setdefault(name, {}), tally)
        for name, at in part.named_at.items():
            merged.named_at[name] = min(at, merged.named_at.get(name, math.inf))
        if now - part.at < LIVE_SECONDS:
            for name, value in part.gauges.items():
                measured.setdefault(name, []).append(value)
    merged.gauges = {name: _one_of(name, values) for name, values in measured.items()}
    _fold_models(merged)
    return merged


def _add(sums: Tally, tally: Mapping[Labels, list[float]]) -> None:
    for labels, numbers in tally.items():
        there = sums.get(labels)
        sums[labels] = [*numbers] if there is None else [a + b for a, b in zip(there, numbers, strict=True)]


def _one_of(name: str, values: list[float]) -> float:
    if name in SUMMED:
        return sum(values)
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _fold_models(merged: WorkerCounts) -> None:
    """Count the models that came when there were enough with the others."""
    by_age = sorted(merged.named_at, key=lambda name: (merged.named_at[name], name))
    models = merged.tallies.get(MODELS, {})
    for name in by_age[MAX_MODELS:]:
        del merged.named_at[name]
        if (numbers := models.pop((name,), None)) is not None:
            _add(models, {(OTHER,): numbers})
