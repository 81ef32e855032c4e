"""What the demo prints beside its timeline: where to look while it runs, and what it came to."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from demo.cast import TOO_LARGE, Cast
from demo.llama_cpp import MODEL
from demo.summary import Row, Summary
from demo.tally import Tally

QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}


def what_to_look_at(cast: Cast, data_dir: Path, *, has_dashboard: bool) -> str:
    """Return the addresses, the keys, and lines to paste into another terminal."""
    python = Path(sys.executable)
    folder = python.parent.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python.parent
    lucid = shlex.quote(str(folder / "lucid"))
    dashboard = f"{cast.url}/dashboard" if has_dashboard else "this version has none"
    return f"""
  the service    {cast.url}, its calls at {cast.url}/docs
  the dashboard  {dashboard}
  a key to look  {cast.reader.key}   (may read, and see the nodes of {cast.reader.owner})
  a key to ask   {cast.guest.key}   (may ask for inference)

  In another terminal, in this folder:

    export LUCID_API_URL={cast.url} LUCID_DATA_DIR={shlex.quote(str(data_dir))}
    {lucid} nodes --watch
    {lucid} models
    {lucid} jobs --limit 10
    {lucid} match {MODEL}
    {lucid} events {cast.nodes[0].name}
    curl -s $LUCID_API_URL/models/{TOO_LARGE}/availability -H "Authorization: Bearer {cast.reader.key}"
    curl -s $LUCID_API_URL/v1/chat/completions -H "Authorization: Bearer {cast.guest.key}" \\
      -d '{json.dumps(QUESTION)}'
"""


def what_it_came_to(summary: Summary, tally: Tally) -> str:
    """Return the summary as text."""
    heads = ("", "clients", "their jobs", "all jobs", "metrics")
    lines = [_line(heads), *(_line(_cells(row)) for row in summary.rows)]
    refused = ", ".join(f"{count:,} x {how}" for how, count in sorted(tally.refused.items()))
    errors = "; ".join(f"{count} x {what}" for what, count in tally.errors.most_common(5)) or "none"
    cut = f"{tally.cut} (their clients were told, and nothing was sent twice)" if tally.cut else "none"
    verdict = (
        "Clients, job ledger and metrics reconcile."
        if summary.reconciles
        else "THEY DO NOT RECONCILE: " + ", ".join(row.name for row in summary.rows if not row.agrees)
    )
    return "\n".join(
        (
            "",
            *lines,
            "",
            f"  {verdict}",
            f"  errors seen by clients      {errors}",
            f"  streams cut half-way        {cut}",
            f"  saved by another node       {tally.rescued}",
            f"  refused, as they should be  {refused or 'none'}",
            f"  time to answer              p50 {summary.p50_ms:.1f} ms, p99 {summary.p99_ms:.1f} ms",
        )
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, *("-" if figure is None else f"{figure:,}" for figure in row[1:]))


def _line(cells: tuple[str, ...]) -> str:
    return "  " + f"{cells[0]:<22}" + "".join(f"{cell:>13}" for cell in cells[1:])
