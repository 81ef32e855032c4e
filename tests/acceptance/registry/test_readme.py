"""The README's session, pasted into a shell beside a real `lucid serve`: what it says is what happens."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import ROOT
from tests.lucid_serve import Served, serving
from tests.shell_scripts import run_script

README = ROOT / "README.md"
NEVER_THE_SAME = {"id", "passportId", "nextHeartbeatInSeconds"}
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Step(NamedTuple):
    """One bash block of the session, and the answer that the README shows for it; None when it shows none."""

    script: str
    shown: str | None


def session() -> list[Step]:
    """Read the steps between the session's two comments."""
    text = README.read_text().split("<!-- session", 1)[1].split("<!-- end of session -->", 1)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    steps: list[Step] = []
    for language, body in blocks:
        if language == "bash":
            steps.append(Step(body, None))
        else:
            assert steps[-1].shown is None, "two answers to one block"
            steps[-1] = steps[-1]._replace(shown=body)
    return steps


def run_all(steps: list[Step], served: Served) -> list[str]:
    """Run the blocks in one shell beside the data folder, as pasting does; return what each printed."""
    marker = "=== end of a block ==="
    lines = [f"{step.script}\nprintf '\\n%s\\n' '{marker}'" for step in steps]
    return [printed.strip() for printed in run_script("\n".join(lines), served).split(marker)][:-1]


def likeness(value: Any, key: str = "") -> Any:
    """Return the value with what differs from run to run named by its kind alone."""
    if isinstance(value, dict):
        return {name: likeness(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [likeness(item) for item in value]
    if key in NEVER_THE_SAME:
        return type(value).__name__
    return "an instant" if isinstance(value, str) and INSTANT.fullmatch(value) else value


def test_the_session_of_the_readme_works_when_it_is_pasted() -> None:
    """Each block succeeds, and each answer that is shown is the one that comes, but for ids and instants."""
    if shutil.which("curl", path=os.defpath) is None:
        pytest.skip("the session is written for curl, and this machine has none")
    steps = session()
    with serving() as served:
        outputs = run_all(steps, served)
    for step, printed in zip(steps, outputs, strict=True):
        if step.shown is None:
            assert not printed, step.script
        elif step.shown.startswith("{"):
            assert likeness(json.loads(printed)) == likeness(json.loads(step.shown)), step.script
        else:
            assert printed == step.shown.strip(), step.script


def test_the_session_shows_the_whole_life_of_a_node() -> None:
    """Registration, heartbeat, models, health, drain and deregistration all stand in it."""
    pasted = "".join(step.script for step in session())
    for call in ("/passports", "/compute/heartbeat", "/models", "/compute/health/", "/compute/drain/"):
        assert f"$LUCID{call}" in pasted
    assert pasted.rstrip().endswith('"$LUCID/compute/deregister/$NODE" -H "$AUTH"')


def leads_somewhere(folder: Path, path: str, anchor: str = "") -> bool:
    """Return whether the file is there, and a heading of it if one is named."""
    if not anchor:
        return (folder / path).exists()
    headings = re.findall(r"^#+ (.+)$", (folder / path).read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths_of_the_map() -> list[str]:
    """Return what the map names, as paths of the repository: a deeper indentation is inside the folder above it."""
    (block,) = re.findall(r"^```\n(alembic\.ini.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    paths: list[str] = []
    folders: dict[int, str] = {}
    for line in block.splitlines():
        indentation = len(line) - len(line.lstrip())
        above = next((folders[depth] for depth in sorted(folders, reverse=True) if depth < indentation), "")
        names = re.split(r" {3,}", line.strip())[0].split()
        folders = {depth: folder for depth, folder in folders.items() if depth < indentation}
        folders[indentation] = above + names[-1]
        paths += [above + name for name in names]
    return paths


def test_every_file_that_the_readme_points_to_is_there() -> None:
    """Links and the map name what exists."""
    text = README.read_text()
    folder = README.parent
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert [link for link in links if not leads_somewhere(folder, *link.split("#"))] == []
    assert [path for path in paths_of_the_map() if not (folder / path).exists()] == []


def test_the_map_of_the_readme_has_every_package_and_every_file_beside_them() -> None:
    """A reader who looks for something finds its place there."""
    package = README.parent / "src" / "lucid_compute"
    packages = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert {f"src/lucid_compute/{name}" for name in packages | files} <= set(paths_of_the_map())
