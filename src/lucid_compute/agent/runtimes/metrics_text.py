"""Read a few metrics by their exact names from Prometheus's text format.

https://prometheus.io/docs/instrumenting/exposition_formats. Names are matched exactly: `num_requests_waiting_by_reason`
and `num_requests_waiting` count the same requests.

Why not prometheus_client's parser: it raises at the first line that it can't read, so one bad line of a foreign server
would cost the complete scrape. This reader skips that line. It also parses only the wanted names, not the hundreds of
histogram buckets of a server that is read every few seconds.
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
    """One line: a value and its labels."""

    labels: Mapping[str, str]
    value: float


class MetricSamples:
    """The samples of one scrape with the requested names. A missing sample is None, never 0."""

    def __init__(self, samples: Mapping[str, list[Sample]]) -> None:
        self._samples = samples

    def total(self, name: str, *, per: Collection[str] = ()) -> float | None:
        """Return the sum over all label sets. Of samples that differ only in the labels `per`, the largest counts.

        The ranks of one engine each report the engine's own count; their labels are `per`.
        """
        largest: dict[tuple[tuple[str, str], ...], float] = {}
        for labels, value in self._samples.get(name, ()):
            place = tuple(sorted(item for item in labels.items() if item[0] not in per))
            largest[place] = max(value, largest.get(place, value))
        return sum(largest.values()) if largest else None

    def has_several(self, name: str, label: str) -> bool:
        """Return whether the samples are of several values of a label, such as several ranks."""
        return len({labels.get(label) for labels, _ in self._samples.get(name, ())}) > 1

    def largest_share(self, name: str, label: str, limit: int | None) -> float | None:
        """Return the largest total of one value of `label`, of an equal part of `limit`; None without samples."""
        samples = self._samples.get(name, ())
        found = {labels.get(label) for labels, _ in samples}
        if not found or limit is None:
            return None
        most = max(max(value for labels, value in samples if labels.get(label) == one) for one in found)
        return min(most * len(found) / limit, 1.0)

    def largest(self, *names: str) -> float | None:
        """Return the largest value under the first of `names` that has samples."""
        for name in names:
            if samples := self._samples.get(name):
                return max(sample.value for sample in samples)
        return None

    def count(self, name: str, *, per: Collection[str] = ()) -> int | None:
        """Return `total` as a whole number."""
        total = self.total(name, per=per)
        return None if total is None or total >= _WHOLE_LIMIT else int(total)

    def share(self, *names: str) -> float | None:
        """Return `largest` if it is 0 to 1."""
        largest = self.largest(*names)
        return largest if largest is not None and largest <= 1 else None

    def values(self, names: Iterable[str]) -> tuple[float, ...] | None:
        """Return the totals of those `names` that have samples; None when none has."""
        totals = tuple(total for name in names if (total := self.total(name)) is not None)
        return totals or None

    def samples(self, name: str) -> list[Sample]:
        """Return the samples of one name."""
        return self._samples.get(name, [])


NO_METRICS = MetricSamples({})


def read_metrics(
    text: str, names: Collection[str], keeps: Callable[[Mapping[str, str]], bool] = lambda _: True
) -> MetricSamples:
    """Return the samples with these `names` whose labels `keeps` accepts.

    A line that can't be read is left out, and so is a value that is negative, infinite or not a number: a gauge of
    requests has no such value, so it is unknown.
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
