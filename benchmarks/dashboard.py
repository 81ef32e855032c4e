"""The claim: the dashboard's first view over 10,000 nodes appears within 300 ms.

A real Chromium opens `/dashboard` with a key, on a real `lucid serve` with 10,000 nodes of 2,000 kinds and 1,000
models, while every node sends its heartbeats. Timed by the page itself, from the navigation's start until the frame
after the fleet's counts stand in it: with an empty cache, and as a second visit. Then the charts, the list of nodes and
the explanation of a model, each until its last row or chart is there.
"""

from __future__ import annotations

import asyncio
import os
from statistics import median

from benchmarks.fleet_rows import OWNER, refresh, write_fleet
from benchmarks.fleet_shapes import models, nodes_of_many_kinds
from benchmarks.load import heartbeat_requests, steady_load
from benchmarks.servers import ADMIN_KEY, data_folder, describe_cores, lucid_serve, postgres_of, wait_for_quiet
from tests.browser import Chromium, Page

NODES = 10_000
HEARTBEAT_SECONDS = 9.0
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "9"))
# What is there when a view is: by its address, an expression.
VIEWS = {
    "fleet, counts": ("", "document.querySelectorAll('.glance .figure').length > 10"),
    "fleet, charts": ("", "document.querySelectorAll('.chart').length === 8"),
    "list of nodes": ("/nodes", "document.querySelectorAll('.rows tbody tr').length === 50"),
    "a model, by reason": ("/models/model-1", "document.querySelectorAll('.group').length > 0"),
}
_WATCH = """
(() => {{
    window.seenAt = 0;
    const look = () => {{
        if (!window.seenAt && ({there})) requestAnimationFrame(() => {{ window.seenAt ||= performance.now(); }});
    }};
    new MutationObserver(look).observe(document, {{ childList: true, subtree: true }});
}})()
"""


def main() -> None:
    """Measure, and print medians."""
    nodes = nodes_of_many_kinds(NODES)
    with data_folder() as folder:
        with postgres_of(folder) as url:
            asyncio.run(write_fleet(url, nodes, models()))
            asyncio.run(refresh(url))
        with lucid_serve(folder, heartbeat_max_per_second="0") as server:
            key = server.make_key(OWNER)
            beats = heartbeat_requests([node.id for node in nodes], key)
            wait_for_quiet()
            with (
                steady_load(server.port, beats, per_second=NODES / HEARTBEAT_SECONDS, round_=0),
                Chromium() as chromium,
                chromium.page() as page,
            ):
                _log_in(page, f"http://127.0.0.1:{server.port}/dashboard")
                print(f"{NODES:,} nodes that send {NODES / HEARTBEAT_SECONDS:,.0f} heartbeats/s; {describe_cores()}")
                print(f"{'until it is seen (ms)':<26}{'empty cache':>13}{'again':>9}")
                for name, (path, there) in VIEWS.items():
                    cold, warm = (_measure(page, server.port, path, there, is_cold=cold) for cold in (True, False))
                    print(f"{name:<26}{cold:>13.0f}{warm:>9.0f}")


def _log_in(page: Page, url: str) -> None:
    page.go(url)
    page.wait_for_text("Log in", "h1")
    page.fill("#key", ADMIN_KEY)
    page.press("Enter")
    page.wait_for_text("All nodes")


def _measure(page: Page, port: int, path: str, there: str, *, is_cold: bool) -> float:
    """Return the median of some visits."""
    script = page.send("Page.addScriptToEvaluateOnNewDocument", source=_WATCH.format(there=there))["identifier"]
    found = []
    for _ in range(ROUNDS):
        if is_cold:
            page.send("Network.clearBrowserCache")
        page.go(f"http://127.0.0.1:{port}/dashboard{path}")
        found.append(float(page.wait_for("window.seenAt")))
    page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    return median(found)


if __name__ == "__main__":
    main()
