"""Prometheus's text format, as much of it as is needed to read a few metrics by their exact names.

https://prometheus.io/docs/instrumenting/exposition_formats. Names are matched whole: `num_requests_waiting_by_reason`
stands beside `num_requests_waiting`, and both count the same requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*")
_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_WHOLE_LIMIT = 2.0**63


class Sample(NamedTuple):
    """One line: a value, and the labels it stands under."""

    labels: Mapping[str, str]
    value: float


class MetricSamples:
    """The samples of one scrape whose names were asked for. What is not there is None, never 0."""

    def __init__(self, samples: Mapping[str, list[Sample]]) -> None:
        """Hold what `read_metrics` found."""
        self._samples = samples

    def total(self, name: str, *, per: Collection[str] = ()) -> float | None:
        """Answer the sum over all label sets; of samples that differ in the labels `per` alone the largest counts.

        Ranks of one engine each report the engine's own count: those are `per`.
        """
        largest: dict[tuple[tuple[str, str], ...], float] = {}
        for labels, value in self._samples.get(name, ()):
            place = tuple(sorted(item for item in labels.items() if item[0] not in per))
            largest[place] = max(value, largest.get(place, value))
        return sum(largest.values()) if largest else None

    def largest(self, *names: str) -> float | None:
        """Answer the largest value under the first of `names` that is there."""
        for name in names:
            if samples := self._samples.get(name):
                return max(sample.value for sample in samples)
        return None

    def count(self, name: str, *, per: Collection[str] = ()) -> int | None:
        """Answer `total` as a whole number."""
        total = self.total(name, per=per)
        return None if total is None or total >= _WHOLE_LIMIT else int(total)

    def share(self, *names: str) -> float | None:
        """Answer `largest`, if it is from 0 to 1."""
        largest = self.largest(*names)
        return largest if largest is not None and largest <= 1 else None

    def values(self, names: Iterable[str]) -> tuple[float, ...] | None:
        """Answer the totals under `names`, of those that are there; None when none is."""
        totals = tuple(total for name in names if (total := self.total(name)) is not None)
        return totals or None

    def samples(self, name: str) -> list[Sample]:
        """Answer the samples under one name."""
        return self._samples.get(name, [])


NO_METRICS = MetricSamples({})


def read_metrics(
    text: str, names: Collection[str], keeps: Callable[[Mapping[str, str]], bool] = lambda _: True
) -> MetricSamples:
    """Answer the samples of these `names` whose labels `keeps` accepts.

    A line that can't be read is left out, as is a value that is negative, infinite or not a number: a gauge of requests
    has none of these, so it is unknown.
    """
    found: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name not in names or (match := _SAMPLE.fullmatch(line)) is None:
            continue
        labels = dict(_LABEL.findall(match[2] or ""))
        value = _number(match[3])
        if value is not None and keeps(labels):
            found.setdefault(name, []).append(Sample(labels, value))
    return MetricSamples(found)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
