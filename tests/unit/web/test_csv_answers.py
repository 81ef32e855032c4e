"""CSV for spreadsheets: what is read back is what was written, and nobody's name becomes a formula."""

from __future__ import annotations

import csv
import io

import pytest

from lucid_compute.web.csv import write_csv


def written(*cells: object) -> list[str]:
    """The cells of one line as a spreadsheet reads them."""
    answer = write_csv(["a"] * len(cells), [cells])
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    _, line = csv.reader(io.StringIO(bytes(answer.body).decode(), newline=""))
    return line


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＠a"])  # noqa: RUF001 - as strangers write
def test_no_text_becomes_a_formula(name: str) -> None:
    assert written(name) == [f"'{name}"]


def test_figures_and_names_stay_as_they_are() -> None:
    """Money to the last digit; a figure below 0 is a number; unknown is empty, never 0."""
    cells = ("0.000000000001", -1.5, 0, None, 'a "b", c;d', "ünï😀\nline", "12345678901234567890.123456789012")
    assert written(*cells) == ["" if cell is None else str(cell) for cell in cells]
