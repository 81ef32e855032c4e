"""What `lucid uptime` says of a node: no verdict on an hour or less, and no share of a budget below nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lucid_compute.accounting.measured import StateRollup
from lucid_compute.accounting.series_views import view_windows
from lucid_compute.cli.metrics_commands import uptime_table


def shown(*, target: float, **seconds: float) -> list[str]:
    """The cells of a node's first window, of which the states lasted so long."""
    rollups = [StateRollup(dict(seconds)) for _ in range(3)]
    file = io.StringIO()
    Console(file=file, width=200).print(uptime_table(view_windows(rollups, target)))
    return file.getvalue().splitlines()[1].split("  ")


@pytest.mark.parametrize(
    ("healthy", "unhealthy", "uptime", "left"),
    [
        (44, 0, "44 s", "-"),
        (20, 10, "30 s", "-"),
        (3500, 99, "60 min", "-"),
        (3600, 0, "100.000 %", "100.0 %"),
        (86400 - 43.2, 43.2, "99.950 %", "50.0 %"),
        (86400 - 86.4, 86.4, "99.900 %", "0.0 %"),
        (40000, 46400, "46.296 %", "overspent"),
    ],
)
def test_a_verdict_needs_an_hour_and_what_is_overspent_is_called_so(
    healthy: float, unhealthy: float, uptime: str, left: str
) -> None:
    cells = [cell.strip() for cell in shown(target=0.999, healthy=healthy, unhealthy=unhealthy) if cell.strip()]
    assert uptime in cells[1]
    assert cells[1].startswith("since ") == (healthy + unhealthy < 3600)
    assert cells[-1] == left
    assert not any("-" in cell and cell != "-" for cell in cells)


def test_a_budget_is_never_less_than_nothing() -> None:
    """What is overspent stands in the seconds that were used."""
    rollup = StateRollup({"healthy": 100.0, "unhealthy": 86300.0})
    (budget, *_) = [window.error_budget for window in view_windows([rollup] * 3, 0.999)]
    assert budget is not None
    assert (budget.remaining, budget.used_seconds > budget.allowed_seconds) == (0.0, True)
