"""`python -m benchmarks [name…]`: run the named benchmarks, or all that take no minutes, and print what they found."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "heartbeats",
    "available_models",
    "fleet_costs",
    "dispatch",
    "group_commit",
    "job_ledger",
    "payouts",
    "gateway",
    "agent",
    "dashboard",
    "stalls",
)
# Run by name alone.
LONG = (
    "bulk_registration",
    "records_size",
    "fleet_churn",
    "gateway_soak",
    "gateway_overload",
    "outbound",
    "dashboard_pictures",
)


def main(names: list[str]) -> int:
    """Run each benchmark; return the exit status."""
    if unknown := [name for name in names if name not in NAMES + LONG]:
        print(f"There is no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES + LONG)}.", file=sys.stderr)
        return 2
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
