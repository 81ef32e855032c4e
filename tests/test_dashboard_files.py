"""What the dashboard is made of: files of our own, and a page that loads nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lucid_compute.server.dashboard.site import Site
from tests.test_house_rules import MAX_FILE_LINES, SOURCE

STATIC = SOURCE / "server" / "dashboard" / "static"
OURS = sorted(path for path in STATIC.iterdir() if path.suffix == ".js")


def test_there_are_no_files_of_others() -> None:
    """The page is our own files, in one folder."""
    assert all(path.is_file() for path in STATIC.iterdir())
    assert {path.suffix for path in STATIC.iterdir()} == {".js", ".css", ".svg", ".html"}


@pytest.mark.parametrize("path", [*OURS, STATIC / "index.html", STATIC / "style.css"], ids=lambda path: path.name)
def test_our_files_are_small_and_load_nothing_from_elsewhere(path: Path) -> None:
    """No CDN, no fonts, no trackers: the only addresses of others are names of XML."""
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/)[a-z][\w.-]+\.[a-z]{2,}", text)
    assert "innerHTML" not in text
    assert "dangerously" not in text


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_a_module_is_told_by_its_first_line(path: Path) -> None:
    """As docstrings do in Python."""
    assert path.read_text().startswith("// ")


def test_the_page_names_files_that_there_are() -> None:
    """And every module of ours is fetched at once, and not after the one that imports it."""
    site = Site()
    html = site.index.body.decode()
    assert "{{" not in html
    named = re.findall(rf"/dashboard/assets/{site.digest}/([\w./-]+)", html)
    assert named
    assert all(site.find(site.digest, name) for name in named)
    assert {path.name for path in OURS} <= set(named)


def test_a_file_is_kept_for_good_only_under_its_own_digest() -> None:
    """A page of another version, in the middle of an update, gets what there is and keeps none of it."""
    site = Site()
    today, other = site.find(site.digest, "app.js"), site.find("0" * 16, "app.js")
    assert today is not None
    assert other is not None
    assert "immutable" in today.headers["Cache-Control"]
    assert other.headers["Cache-Control"] == "no-store"
    assert today.body == other.body
    assert site.find(site.digest, "../site.py") is None


def test_the_page_weighs_less_than_150_kb() -> None:
    """As it is sent to a browser that has nothing of it yet."""
    site = Site()
    assets = [site.find(site.digest, path.name) for path in STATIC.iterdir() if path.name != "index.html"]
    assert sum(len(asset.compressed) for asset in (site.index, *assets) if asset) < 150_000
