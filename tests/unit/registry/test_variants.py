"""What a routed name stands for: which model is the first, and which follow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lucid_compute.errors import InvalidRequest
from lucid_compute.registry.domain.metadata import MAX_ROUTED, read_metadata
from lucid_compute.registry.domain.passports import ModelRoute, PassportType

ROUTE = ModelRoute.read({"weights": {"canary": 5, "stable": 90, "old": 5}, "fallbacks": ["small", "other", "old"]})


def test_the_first_model_is_drawn_by_weight_and_the_others_follow_by_weight() -> None:
    assert ROUTE is not None
    orders = Counter(tuple(ROUTE.in_order("self", draw / 1000)) for draw in range(1000))
    assert orders == {
        ("stable", "canary", "old", "small", "other"): 900,
        ("canary", "stable", "old", "small", "other"): 50,
        ("old", "stable", "canary", "small", "other"): 50,
    }
    assert ROUTE.in_order("self", 1 - 2**-53)[0] == "old"


def test_without_weights_the_model_itself_is_the_first() -> None:
    route = ModelRoute.read({"fallbacks": ["b", "self", "a"]})
    assert route is not None
    assert {tuple(route.in_order("self", draw / 10)) for draw in range(10)} == {("self", "b", "a")}


@pytest.mark.parametrize(
    "stored",
    [None, "b", 5, [], {}, {"weights": 5}, {"weights": {"a": "1"}}, {"fallbacks": "abc"}, {"fallbacks": [1]}, {"a": 1}],
)
def test_what_an_older_release_stored_under_the_key_is_no_route(stored: Any) -> None:
    assert ModelRoute.read(stored) is None


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ({}, "metadata.route"),
        ("b", "metadata.route"),
        ({"weights": {}}, "metadata.route.weights"),
        ({"weights": {"a": 0}}, "metadata.route.weights.a"),
        ({"weights": {"a": 0.5}}, "metadata.route.weights.a"),
        ({"weights": {"a": 10**7}}, "metadata.route.weights.a"),
        ({"weights": {"": 1}}, "metadata.route.weights"),
        ({"weights": {f"m{n}": 1 for n in range(MAX_ROUTED + 1)}}, "metadata.route.weights"),
        ({"fallbacks": []}, "metadata.route.fallbacks"),
        ({"fallbacks": ["a", "a"]}, "metadata.route"),
        ({"weights": {"a": 1}, "fallbacks": ["a"]}, "metadata.route"),
        ({"fallbacks": ["a"], "unknown": 1}, "metadata.route.unknown"),
    ],
)
def test_a_route_that_cannot_be_is_refused(route: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_metadata(PassportType.MODEL, {"format": "gguf", "route": route})
    assert refused.value.details["fields"][0]["path"].startswith(path)
