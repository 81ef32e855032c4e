"""Takes the dashboard's pictures for the docs, in a real Chromium: `python -m benchmarks dashboard_pictures`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.pictured_fleet import TROUBLED, Pictured, beat, register, remember
from benchmarks.servers import ADMIN_KEY, Server, data_folder, lucid_serve, postgres_of
from tests.browser import DESK, PHONE, Chromium, Page

FOLDER = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    """Fill a service, and take the pictures."""
    FOLDER.mkdir(exist_ok=True)
    with data_folder() as folder:
        with lucid_serve(folder, heartbeat_max_per_second="0") as server:
            pictured = register(server)
        with postgres_of(folder) as url:
            asyncio.run(remember(url, pictured))
        with lucid_serve(folder, heartbeat_max_per_second="0") as server, Chromium() as chromium:
            for scheme in ("light", "dark"):
                with chromium.page() as page:
                    page.prefer(scheme)
                    _take(page, server, pictured, scheme)


def _take(page: Page, server: Server, pictured: Pictured, scheme: str) -> None:
    url = f"http://127.0.0.1:{server.port}/dashboard"
    node, model = pictured.nodes[TROUBLED], pictured.models[5]
    page.go(url)
    page.wait_for_text("Log in")
    page.screenshot(FOLDER / f"login-{scheme}.png")
    page.fill("#key", ADMIN_KEY)
    page.press("Enter")
    page.wait_for_text("Over time")
    views = {
        "fleet": "",
        "nodes": "/nodes",
        "node": f"/nodes/{node}",
        "model": f"/models/{model}",
        "payouts": "/payouts",
    }
    for name, path in views.items():
        for device, size in (("", DESK), ("-phone", PHONE)):
            beat(server, pictured)
            page.resize(size)
            page.go(url + path)
            page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('h1'))")
            page.wait_for(
                "[...document.querySelectorAll('.chart-canvas')].every((room) => Boolean(room.querySelector('canvas')))"
            )
            _settle(page)
            height = min(page.run("document.documentElement.scrollHeight"), 2600 if device else 1700)
            page.screenshot(FOLDER / f"{name}{device}-{scheme}.png", height=height)


def _settle(page: Page) -> None:
    """Wait until what was loaded is painted."""
    page.run("new Promise((done) => setTimeout(() => requestAnimationFrame(() => done(true)), 600))")
