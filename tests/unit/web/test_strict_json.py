"""Strict JSON: what is refused, where it says that it stands, and how much work a body can make."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lucid_compute.errors import InvalidRequest
from lucid_compute.web.bodies import MAX_BODY_BYTES
from lucid_compute.web.strict_json import MAX_DEPTH, MAX_KEYS, MAX_SEPARATORS, MAX_VALUES, read_strictly
from tests.work import calls_of

REFUSED = {
    b'{"a": [1, {"b": NaN}]}': "a.1.b",
    b'{"a": [1, {"b": -Infinity}]}': "a.1.b",
    b'{"a": {"b": 99999999999999999999}}': "a.b",
    b'{"a": [-9999999999999999999]}': "a.0",
    b'{"a": ' + b"9" * 5000 + b"}": "a",
    b"[1e400]": "0",
    b'{"a": ["\\u0000"]}': "a.0",
    b'{"a": ["\\ud83d"]}': "a.0",
    b'{"a": {"\\u0000": 1}}': "a",
    b'{"a": {"\\u0000": {"b": NaN}}}': "a",
    b'{"a": {"b": 1, "c": 2, "b": 3}}': "a.b",
    b'{"a": 1, "a": 2}': "a",
    b"NaN": "",
    b'"\\u0000"': "",
}
CALLS_A_VALUE = 12


@pytest.mark.parametrize(("body", "path"), REFUSED.items())
def test_what_is_refused_is_named_by_its_path(body: bytes, path: str) -> None:
    """422, and exactly one fault."""
    with pytest.raises(InvalidRequest) as refused:
        read_strictly(body)
    assert refused.value.http_status == 422
    assert [field["path"] for field in refused.value.details["fields"]] == [path]


@pytest.mark.parametrize("value", [None, 0, -1.5, "é", [], {}, [[]], {"a": {"": [1, 2.5, "x", None, True]}}, 2**63 - 1])
def test_what_is_valid_is_read_as_it_is(value: Any) -> None:
    """Also values that are no objects: routes judge them."""
    assert read_strictly(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-16-be"), "UTF-16"),
        ("{}".encode("utf-32"), "UTF-32"),
        ("{}".encode("utf-32-be"), "UTF-32"),
        ('{"é": 1}'.encode("latin-1"), "not UTF-8"),
        (b"{", "not JSON at line 1, column 2"),
    ],
)
def test_another_encoding_is_named(body: bytes, word: str) -> None:
    """400, with a sentence that says what came and what to send."""
    with pytest.raises(InvalidRequest) as refused:
        read_strictly(body)
    assert refused.value.http_status == 400
    assert word in refused.value.message
    assert "Send" in refused.value.message


def test_depth_is_counted_to_the_last_level() -> None:
    """64 levels are read, whatever they are made of; one more is not."""
    for open_, close in (("[", "]"), ('{"a":', "}")):
        deepest = open_ * MAX_DEPTH + "0" + close * MAX_DEPTH
        read_strictly(deepest.encode())
        with pytest.raises(InvalidRequest, match="nested deeper"):
            read_strictly((open_ + deepest + close).encode())


def test_values_and_keys_are_counted() -> None:
    """As many as fit into any route's body are read, and not one more; commas in a text are none."""
    read_strictly(json.dumps([0] * MAX_VALUES).encode())
    read_strictly(json.dumps({str(number): 0 for number in range(MAX_KEYS)}).encode())
    read_strictly(json.dumps("," * (MAX_SEPARATORS - 1)).encode())
    for value in ([0] * (MAX_VALUES + 1), {str(number): 0 for number in range(MAX_KEYS + 1)}):
        with pytest.raises(InvalidRequest, match="more than 20000 values"):
            read_strictly(json.dumps(value).encode())


BRICKS = {
    "numbers": b"0",
    "fractions": b"1.5",
    "texts": b'""',
    "texts of half a character": b'"\\ud83d"',
    "empty lists": b"[]",
    "empty objects": b"{}",
    "objects with one key twice": b'{"":0,"":0}',
    "towers": b"[" * (MAX_DEPTH - 2) + b"]" * (MAX_DEPTH - 2),
    "constants": b"NaN",
}


@pytest.mark.parametrize("brick", BRICKS.values(), ids=BRICKS)
@pytest.mark.parametrize("is_below_a_long_key", [False, True])
def test_a_body_of_any_bricks_makes_bounded_work(brick: bytes, *, is_below_a_long_key: bool) -> None:
    """Of a megabyte: a few calls for each value that may be in it, and no path for a value that is valid."""
    key = b"k" * (MAX_BODY_BYTES // 2 if is_below_a_long_key else 1)
    count = (MAX_BODY_BYTES - len(key) - 10) // (len(brick) + 1)
    body = b'{"%b":[%b]}' % (key, b",".join([brick] * count))
    assert calls_of(lambda: refused_by(body)) < 500

    count = min(count, MAX_SEPARATORS // (1 + brick.count(b"[") + brick.count(b"{") + brick.count(b",")) - 5)
    body = b'{"%b":[%b]}' % (key, b",".join([brick] * count))
    assert calls_of(lambda: refused_by(body, may_pass=True)) < CALLS_A_VALUE * MAX_SEPARATORS


def refused_by(body: bytes, *, may_pass: bool = False) -> None:
    """Read a body, which is refused with a short path, unless it may pass."""
    try:
        read_strictly(body)
    except InvalidRequest as error:
        if len(str(error.body())) > 2000:
            pytest.fail("the body is echoed")
    else:
        assert may_pass


def test_only_a_fault_has_a_path() -> None:
    """A body with and without a very long key makes the same calls: nothing is written for its values."""
    values = b",".join([b"10"] * 15_000)
    short, long = (b'{"%b":[%b]}' % (b"k" * length, values) for length in (1, MAX_BODY_BYTES // 2))
    assert calls_of(lambda: read_strictly(short)) == calls_of(lambda: read_strictly(long))
