"""What Prometheus would read: a scrape, parsed by the client library, and the names in a PromQL expression."""

from __future__ import annotations

import re
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_WINDOW = re.compile(r"\[[^\]]*\]|\boffset\s+\w+|\$\w+")
_NAME = re.compile(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "by", "without", "on", "ignoring"}


class Scrape(NamedTuple):
    """One answer of `/metrics`: the labels of each sample's name, the families' types, how many series there are."""

    labels: dict[str, set[str]]
    types: dict[str, str]
    series: int


def read_scrape(text: str) -> Scrape:
    """Read an answer of `/metrics`."""
    labels: dict[str, set[str]] = {}
    types, series = {}, 0
    for family in text_string_to_metric_families(text):
        types[family.name] = family.type
        for sample in family.samples:
            series += 1
            labels.setdefault(sample.name, set()).update(sample.labels)
    return Scrape(labels, types, series)


class Asked(NamedTuple):
    """What an expression asks for: names of metrics, and names of labels."""

    metrics: set[str]
    labels: set[str]


def read_expression(expression: str) -> Asked:
    """Read the names in a PromQL expression; functions, strings and durations are no names."""
    text = _WINDOW.sub(" ", _STRINGS.sub('""', expression))
    labels = {name for _, inner in _SELECTOR.findall(text) for name in re.findall(r"(\w+)\s*(?:=|!)", inner)}
    text = _SELECTOR.sub(r"\1 ", text)
    labels |= {name.strip() for inner in _GROUPING.findall(text) for name in inner.split(",") if name.strip()}
    text = _GROUPING.sub(" ", text)
    return Asked({name for name in _NAME.findall(text) if name not in _WORDS}, labels)


def value_of(text: str, series: str) -> float:
    """What a scrape says of one series, written as there; 0 when it is not there."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
