"""What one worker counted and measured, as workers publish it to each other, and the sum over workers. Pure.

Counts only grow, and are kept when a worker ends. Gauges are ignored once their worker is gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.gateway.request_metrics import MAX_MODELS, OTHER

MODELS = "models"  # the counts whose labels owners choose
MODEL_OUTCOMES = (Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED)  # counted for each model
LIVE_SECONDS = 5.0
SUMMED = frozenset(
    {
        "lucid_inference_running",
        "lucid_inference_waiting",
        "lucid_jobs_waiting",
        "lucid_loop_tasks",
        "lucid_tunnels",
        "lucid_tunnel_streams",
        "lucid_webhook_deliveries_running",
        "lucid_workers",
    }
)
"""Gauges that are added up over the workers; of all others the greatest is shown."""

Labels = tuple[str, ...]
Counts = dict[Labels, list[float]]


@dataclass
class WorkerCounts:
    """Counts by name, as lists of numbers by labels; gauges; when each model was first named; when this was read.

    Instants are of the monotonic clock, which the workers of a machine share.
    """

    at: float
    counts: dict[str, Counts] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    named_at: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return them as JSON."""
        counts = {name: [[*labels, numbers] for labels, numbers in one.items()] for name, one in self.counts.items()}
        return json.dumps([self.at, counts, self.gauges, self.named_at], separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> WorkerCounts:
        """Return what `to_bytes` wrote."""
        at, counts, gauges, named_at = json.loads(text)
        read = {name: {tuple(row[:-1]): row[-1] for row in rows} for name, rows in counts.items()}
        return cls(at, read, gauges, named_at)


def merge(parts: Iterable[WorkerCounts], now: float) -> WorkerCounts:
    """Return the sums of all counts and the gauges of the workers that live, with at most MAX_MODELS model names.

    The models that were named first keep their names, so a model that was shown once stays.
    """
    merged = WorkerCounts(now)
    measured: dict[str, list[float]] = {}
    for part in parts:
        for name, one in part.counts.items():
            _add(merged.counts.setdefault(name, {}), one)
        for name, at in part.named_at.items():
            merged.named_at[name] = min(at, merged.named_at.get(name, math.inf))
        if now - part.at < LIVE_SECONDS:
            for name, value in part.gauges.items():
                measured.setdefault(name, []).append(value)
    merged.gauges = {name: _merge_gauge(name, values) for name, values in measured.items()}
    _fold_models(merged)
    return merged


def _add(sums: Counts, more: Mapping[Labels, list[float]]) -> None:
    for labels, numbers in more.items():
        known = sums.get(labels)
        sums[labels] = [*numbers] if known is None else [a + b for a, b in zip(known, numbers, strict=True)]


def _merge_gauge(name: str, values: list[float]) -> float:
    if name in SUMMED:
        return sum(values)
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _fold_models(merged: WorkerCounts) -> None:
    """Count the models beyond MAX_MODELS, by their age, as others."""
    by_age = sorted(merged.named_at, key=lambda name: (merged.named_at[name], name))
    models = merged.counts.get(MODELS, {})
    for name in by_age[MAX_MODELS:]:
        del merged.named_at[name]
        if (numbers := models.pop((name,), None)) is not None:
            _add(models, {(OTHER,): numbers})
