"""The README's session, pasted into a shell beside a real `lucid serve`: what it says is what happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

README = Path(__file__).parents[2] / "README.md"
ADDRESS_IN_README = "http://127.0.0.1:8000"
START_TIMEOUT_SECONDS = 60.0
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


@pytest.fixture
def clone() -> Iterator[Path]:
    """A folder to stand in, as a user stands in a clone; Postgres's user can enter it too."""
    folder = Path(tempfile.mkdtemp(prefix="lucid-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def address(clone: Path) -> Iterator[str]:
    """The address of a `lucid serve` on a free port, with its data in the clone, as `make run` has it."""
    lucid = Path(sys.executable).with_name("lucid")
    output = clone / "output"
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [lucid, "serve", "--port", "0"],
            cwd=clone,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"PATH": os.defpath, "HOME": str(clone)},
        ) as service,
    ):
        try:
            yield wait_for_address(service, output)
        finally:
            service.terminate()
            assert service.wait(timeout=60) == 0, output.read_text()


def wait_for_address(service: subprocess.Popen[bytes], output: Path) -> str:
    """Answer the address in the banner, once the whole banner stands there."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while "try " not in output.read_text():
        assert service.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)
    match = re.search(r"listens on (\S+)", output.read_text())
    assert match
    return match[1]


def run_all(steps: list[Step], clone: Path, address: str) -> list[str]:
    """Run the blocks in one shell, as pasting does; answer what each printed."""
    marker = "=== end of a block ==="
    lines = [f"{step.script}\nprintf '\\n%s\\n' '{marker}'" for step in steps]
    script = "\n".join(lines).replace(ADDRESS_IN_README, address)
    folder_of_python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env={"PATH": f"{folder_of_python}:{os.defpath}", "HOME": str(clone), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return [printed.strip() for printed in done.stdout.split(marker)][:-1]


def likeness(value: Any, key: str = "") -> Any:
    """Answer the value with what differs from run to run named by its kind alone."""
    if isinstance(value, dict):
        return {name: likeness(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [likeness(item) for item in value]
    if key in NEVER_THE_SAME:
        return type(value).__name__
    return "an instant" if isinstance(value, str) and INSTANT.fullmatch(value) else value


def test_the_session_of_the_readme_works_when_it_is_pasted(clone: Path, address: str) -> None:
    """Each block succeeds, and each answer that is shown is the one that comes, but for ids and instants."""
    if shutil.which("curl", path=os.defpath) is None:
        pytest.skip("the session is written for curl, and this machine has none")
    steps = session()
    for step, printed in zip(steps, run_all(steps, clone, address), strict=True):
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


def test_every_file_that_the_readme_points_to_is_there() -> None:
    """Links and the map name what exists."""
    text = README.read_text()
    folder = README.parent
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert [link for link in links if not (folder / link).exists()] == []
    of_package = text.split("src/lucid_compute/\n", 1)[1].split("```", 1)[0]
    named = re.findall(r"(?<!\S)(\w+(?:\.py|/))(?=\s|$)", of_package)
    places = (folder / "src" / "lucid_compute", folder, folder / "tests")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
