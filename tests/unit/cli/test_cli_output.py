"""What the command line makes of values: text for a terminal, columns for its width, instants, metadata."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lucid_compute.cli.connection import find_local_key, is_loopback
from lucid_compute.cli.formatting import number, plain, share, span
from lucid_compute.cli.output import Column, Listing
from lucid_compute.cli.time_arguments import read_future, read_past

COLUMNS = (
    Column("NAME", shortest=8),
    Column("STATUS"),
    Column("LOAD", rank=1, right=True),
    Column("MODELS", rank=2, shortest=6),
)
ROWS = [("a-very-long-name-of-a-node", "healthy", "42 %", "one, two, three"), ("b", "draining", "-", "-")]


def drawn(width: int, rows: Sequence[tuple[str, ...]] = ROWS, most_rows: int | None = None) -> list[str]:
    """Return the lines of a listing on a terminal of that width."""
    file = io.StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(Listing(COLUMNS, rows, most_rows))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", range(10, 80))
def test_a_listing_is_never_wider_than_the_terminal(width: int) -> None:
    """However narrow, each row stays one line."""
    lines = drawn(width)
    assert len(lines) == 1 + len(ROWS)
    assert max(map(len, lines)) <= max(width, 14)


def test_the_least_important_column_goes_first() -> None:
    """Then the next; those of rank 0 stay."""
    assert drawn(80)[0].split() == ["NAME", "STATUS", "LOAD", "MODELS"]
    assert drawn(29)[0].split() == ["NAME", "STATUS", "LOAD"]
    assert drawn(20)[0].split() == ["NAME", "STATUS"]


def test_a_column_that_knows_nothing_goes_before_all_others() -> None:
    """Unless there is room for it."""
    rows = [("node", "healthy", "-", "one")]
    assert drawn(24, rows)[0].split() == ["NAME", "STATUS", "MODELS"]
    assert drawn(80, rows)[0].split() == ["NAME", "STATUS", "LOAD", "MODELS"]


def test_what_room_is_left_goes_to_what_was_cut_off() -> None:
    """The most important first, and nothing is cut off where all has room."""
    assert drawn(40)[1].startswith("a-very-long-")
    assert "a-very-long-name-of-a-node" in drawn(80)[1]
    assert "one, two, three" in drawn(80)[1]


def test_a_live_listing_says_how_many_rows_it_left_out() -> None:
    """So that nobody takes it for the whole."""
    assert drawn(80, most_rows=1)[-1].strip() == "and 1 more"
    assert len(drawn(80, most_rows=2)) == 3


@given(st.text())
def test_plain_text_is_one_line_that_moves_no_cursor(text: str) -> None:
    """Whatever stands in a name."""
    assert plain(text).isprintable()


def test_unknown_is_a_dash_and_never_0() -> None:
    """And 0 is 0."""
    assert (span(None), share(None), number(None, "GB")) == ("-", "-", "-")
    assert (span(0), share(0), number(0, "GB")) == ("0 s", "0 %", "0 GB")


@pytest.mark.parametrize(
    ("seconds", "written"), [(4.4, "4 s"), (119, "119 s"), (180, "3 min"), (9000, "2.5 h"), (12 * 86400, "12 d")]
)
def test_spans_are_in_the_largest_unit_that_tells_something(seconds: float, written: str) -> None:
    """As a person would say it."""
    assert span(seconds) == written


def test_instants_are_said_absolutely_or_as_a_distance() -> None:
    """Without a zone they are UTC."""
    assert (
        read_past("2026-01-31T12:00:00Z") == read_future("2026-01-31T12:00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    )
    assert abs(read_past("90m") - (datetime.now(UTC) - timedelta(minutes=90))) < timedelta(minutes=1)
    assert abs(read_future("7d") - (datetime.now(UTC) + timedelta(days=7))) < timedelta(minutes=1)
    for text in ("yesterday", "7", "-7d", "99999999d", ""):
        with pytest.raises(typer.BadParameter, match="Say an instant"):
            read_past(text)


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:8000", True),
        ("http://localhost:8000", True),
        ("http://localhost.example.com", False),
        ("http://127.0.0.1.example.com", False),
        ("http://127.0.0.1@example.com", False),
        ("http://10.0.0.1", False),
        ("https://example.com", False),
        ("127.0.0.1", False),
    ],
)
def test_the_key_of_this_machine_goes_to_loopback_alone(url: str, is_local: bool) -> None:
    """By what the URL names, not by how it looks."""
    assert is_loopback(url) is is_local


def test_the_key_of_this_machine_is_given_for_no_other_address(tmp_path: Path) -> None:
    """Though its file can be read."""
    file = tmp_path / "admin.key"
    file.write_text("lk_live_of_this_machine\n")
    file.chmod(0o600)
    assert find_local_key("http://127.0.0.1:8000", tmp_path) == "lk_live_of_this_machine"
    assert find_local_key("https://compute.example.com", tmp_path) is None
    assert find_local_key("http://127.0.0.1:8000", tmp_path / "elsewhere") is None
