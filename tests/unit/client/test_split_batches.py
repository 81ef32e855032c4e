"""How passports are split into calls that the service takes."""

from __future__ import annotations

import json

import pytest

from lucid_compute.client import split_batches
from lucid_compute.web.strict_json import read_strictly


@pytest.mark.parametrize(
    ("metadata", "sizes"),
    [({}, {1000, 500}), ({"x": "x" * 30_000}, {33, 15}), ({"x": [1] * 200}, {97, 45}), ({"x": "ä" * 15_000}, {33, 15})],
)
def test_a_batch_has_no_more_than_a_body_may_hold(metadata: dict[str, object], sizes: set[int]) -> None:
    passports = [{"name": f"n{number:04}", "type": "agent", "metadata": metadata} for number in range(1500)]
    batches = list(split_batches(passports))
    assert [passport for batch in batches for passport in batch] == passports
    assert {len(batch) for batch in batches} == sizes
    for batch in batches:
        body = json.dumps({"passports": batch}, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(body) <= 1024 * 1024
        read_strictly(body)


def test_one_that_is_too_large_for_any_call_is_alone() -> None:
    large = {"name": "x", "type": "agent", "metadata": {"x": "x" * 2_000_000}}
    small = {"name": "y", "type": "agent"}
    assert list(split_batches([small, large, small])) == [[small], [large], [small]]
