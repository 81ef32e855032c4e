"""Responses as CSV for spreadsheets: when a request wants one, and how it is written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Query, Response

CSV = "text/csv; charset=utf-8"
_BEGIN_FORMULAS = frozenset("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - spreadsheets of East Asia accept the wide ones as well
CSV_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}

Format = Literal["json", "csv"]


async def wants_csv(
    format_: Annotated[Format | None, Query(alias="format", description="Goes before `Accept`.")] = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> bool:
    """Return whether the response is CSV: by `format`, else by `Accept: text/csv`."""
    return format_ == "csv" if format_ is not None else (accept or "").strip().startswith("text/csv")


CsvDependency = Annotated[bool, Depends(wants_csv)]


def write_csv(head: Sequence[str], lines: Iterable[Sequence[object]]) -> Response:
    """Return a CSV response: the titles in `head`, then the lines of cells."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows([_escape(cell) for cell in line] for line in lines)
    return Response(text.getvalue(), media_type=CSV)


def _escape(cell: object) -> object:
    """Return a cell that no spreadsheet reads as a formula: owners choose names freely."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in _BEGIN_FORMULAS else cell
