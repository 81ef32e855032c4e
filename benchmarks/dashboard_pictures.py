"""Takes the dashboard's pictures for the docs, in a real Chromium: `make pictures`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from benchmarks.pictured_fleet import BEYOND_REACH, TROUBLED, Pictured, beat, register, remember
from benchmarks.servers import ADMIN_KEY, Server, data_folder, lucid_serve, postgres_of
from tests.browser import DESK, PHONE, Chromium, Page, Size

FOLDER = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 100_000
QUALITIES = (92, 85, 75, 60)  # the first at which a picture is small enough


class Picture(NamedTuple):
    """One picture: of a view, by its path with `{node}` and `{model}`, in a window's width and down to a height."""

    name: str
    path: str
    scheme: str
    size: Size
    height: int


PICTURES = (
    Picture("fleet-light", "", "light", DESK, 1340),
    Picture("fleet-dark", "", "dark", DESK, 960),
    Picture("nodes-dark", "/nodes", "dark", DESK, 760),
    Picture("node-light", "/nodes/{node}", "light", DESK, 1700),
    Picture("model-light", "/models/{model}", "light", DESK, 760),
    Picture("usage-light", "/usage?by=model&owner=shop&span=-30d", "light", DESK, 1150),
    Picture("add-node-light", "/nodes?add=node", "light", DESK, 900),
    Picture("fleet-phone", "", "light", PHONE, 844),
    Picture("node-phone", "/nodes/{node}", "dark", PHONE, 844),
)


def main() -> None:
    """Fill a service, and take the pictures."""
    FOLDER.mkdir(exist_ok=True)
    with data_folder() as folder:
        with lucid_serve(folder, heartbeat_max_per_second="0") as server:
            pictured = register(server)
        with postgres_of(folder) as url:
            asyncio.run(remember(url, pictured))
        with (
            lucid_serve(folder, heartbeat_max_per_second="0") as server,
            Chromium() as chromium,
            chromium.page() as page,
        ):
            _log_in(page, server)
            for picture in PICTURES:
                beat(server, pictured)
                _take(page, server, pictured, picture)


def _log_in(page: Page, server: Server) -> None:
    page.go(f"http://127.0.0.1:{server.port}/dashboard")
    page.wait_for_text("Log in", "h1")
    page.fill("#key", ADMIN_KEY)
    page.press("Enter")
    page.wait_for_text("All nodes")


def _take(page: Page, server: Server, pictured: Pictured, picture: Picture) -> None:
    page.prefer(picture.scheme)
    page.resize(picture.size)
    path = picture.path.format(node=pictured.nodes[TROUBLED], model=pictured.models[BEYOND_REACH])
    page.go(f"http://127.0.0.1:{server.port}/dashboard{path}")
    page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('h1'))")
    page.wait_for(
        "[...document.querySelectorAll('.chart-canvas')].every((room) => Boolean(room.querySelector('canvas')))"
    )
    _settle(page)
    height = min(page.run("document.documentElement.scrollHeight"), picture.height)
    for quality in QUALITIES:
        shot = page.screenshot(height=height, quality=quality)
        if len(shot) <= MOST_BYTES:
            break
    (FOLDER / f"{picture.name}.webp").write_bytes(shot)
    print(f"{picture.name}: {len(shot) / 1000:.0f} KB at quality {quality}")


def _settle(page: Page) -> None:
    """Wait until what was loaded is painted."""
    page.run("new Promise((done) => setTimeout(() => requestAnimationFrame(() => done(true)), 600))")
