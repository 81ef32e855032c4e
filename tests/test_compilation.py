"""The compiled build: it is used for the sources that it was made from, and for no others."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lucid_compute.compilation import NEWEST, SOURCES, SourceLine, builds_of, find_build, python_tag
from tests import ROOT

SCRIPT = ROOT / "scripts" / "compile.py"


class FakeBuild(NamedTuple):
    """A package of two files, and the folder of a build of it."""

    prefix: Path
    package: Path
    folder: Path

    def find(self, setting: str = "") -> tuple[Path | None, str]:
        """Ask as a starting process does."""
        return find_build(str(self.prefix), self.package, setting)


@pytest.fixture
def build(tmp_path: Path) -> FakeBuild:
    """A build as the script leaves it, without any module."""
    package = tmp_path / "package"
    (package / "inside").mkdir(parents=True)
    (package / "one.py").write_text("ONE = 1\n")
    (package / "inside" / "a name.py").write_text("TWO = 2\n")
    builds = builds_of(str(tmp_path))
    folder = builds / f"{python_tag()}-0123456789"
    folder.mkdir(parents=True)
    lines = [str(SourceLine.of(package, path)) for path in ("one.py", "inside/a name.py")]
    (folder / SOURCES).write_text("".join(lines))
    (builds / NEWEST).symlink_to(folder.name)
    return FakeBuild(tmp_path, package, folder)


def edit(build: FakeBuild) -> None:
    (build.package / "inside" / "a name.py").write_text("TWO = 3\n")  # as long as before


def lengthen(build: FakeBuild) -> None:
    (build.package / "one.py").write_text("ONE = 11\n")


def remove_source(build: FakeBuild) -> None:
    (build.package / "one.py").unlink()


def remove_list(build: FakeBuild) -> None:
    (build.folder / SOURCES).unlink()


def cut_list_short(build: FakeBuild) -> None:
    (build.folder / SOURCES).write_text("0123")


def compile_for_another_python(build: FakeBuild) -> None:
    other = build.folder.rename(build.folder.with_name("cpython-399-0123456789"))
    link = build.folder.with_name(NEWEST)
    link.unlink()
    link.symlink_to(other.name)


def remove_build(build: FakeBuild) -> None:
    shutil.rmtree(build.folder)


def test_a_build_is_used_for_the_sources_that_it_was_made_from(build: FakeBuild) -> None:
    assert build.find() == (build.folder, "")
    assert build.find("true") == (build.folder, "")


def test_a_file_that_was_only_touched_is_the_same_source(build: FakeBuild) -> None:
    """As after a checkout of another commit and back, and in an image whose layers keep whole seconds."""
    os.utime(build.package / "one.py", (1, 1))
    assert build.find() == (build.folder, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit, "the sources changed since they were compiled"),
        (lengthen, "the sources changed since they were compiled"),
        (remove_source, "the sources changed since they were compiled"),
        (remove_list, "the sources changed since they were compiled"),
        (cut_list_short, "what is compiled can't be used: "),
        (compile_for_another_python, "it is compiled for another Python"),
        (remove_build, "not compiled"),
    ],
)
def test_what_is_not_made_from_these_sources_is_not_used(
    build: FakeBuild, change: Callable[[FakeBuild], None], reason: str
) -> None:
    change(build)
    found, said = build.find()
    assert found is None
    assert said.startswith(reason)


@pytest.mark.parametrize("setting", ["false", "0", " No "])
def test_a_setting_runs_the_sources(build: FakeBuild, setting: str) -> None:
    assert build.find(setting) == (None, "as LUCID_COMPILED says")


@pytest.mark.parametrize("setting", ["true", "false"])
def test_the_setting_is_obeyed_or_refused_with_a_sentence(tmp_path: Path, setting: str) -> None:
    """A service that must be compiled and is not does not start."""
    environment = {"PATH": os.defpath, "LUCID_COMPILED": setting, "LUCID_PORT": "0"}
    python = lonely_python(tmp_path)
    code = "from lucid_compute.server.settings import Settings; Settings(); from lucid_compute import FORM; print(FORM)"
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if setting == "true":
        assert "interpreted (not compiled). Run make compile in the checkout, or leave it unset." in done.stderr
    else:
        version = ".".join(map(str, sys.version_info[:3]))
        assert done.stdout == f"Python {version}, interpreted (as LUCID_COMPILED says)\n"


def lonely_python(folder: Path) -> Path:
    """Make a virtual environment that sees the packages of this one, and no build."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT / 'src'}\n")
    return folder / "venv" / "bin" / "python"


# --- which modules


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class Model(BaseModel):\n    pass\n\n\nclass Special(Model):\n    pass\n", "Model is a Pydantic model"),
        ("async def numbers():\n    yield 1\n", "numbers is an asynchronous generator"),
        ("from fastapi import APIRouter\n", "FastAPI reads its annotations"),
        ("HERE = __file__\n", "it reads __file__"),
        (
            "class Pair(NamedTuple):\n    one: Later\n\n\nclass Later:\n    pass\n",
            "Pair names Later, which is defined below it",
        ),
        (
            "class Fault(ValueError):\n    @property\n    def reason(self): ...\n",
            "Fault is an exception with a property, whose compiled code crashes",
        ),
        (
            "class Packed(Mapping[str, int]):\n    pass\n",
            "Packed derives from an abstract class, and would take the instances of that for its own",
        ),
        ("class Fault(ValueError):\n    def reason(self): ...\n", None),
        ("async def run():\n    def numbers():\n        yield 1\n", None),
        ("class Later:\n    pass\n\n\nclass Pair(NamedTuple):\n    one: Later\n", None),
    ],
)
def test_a_module_that_mypyc_gets_wrong_is_left_out(tmp_path: Path, source: str, reason: str | None) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "one.py").write_text(source)
    (tmp_path / "pyproject.toml").write_text(RULES)
    compiled, left_out = runpy.run_path(str(SCRIPT))["select"](package, tmp_path / "pyproject.toml")
    assert (compiled == [package / "one.py"]) is (reason is None)
    assert left_out.get(package / "one.py") == reason


RULES = '[tool.lucid.compile]\npackages = []\nmodules = ["one"]\n[tool.lucid.compile.except]\n'


# --- the script, with a compiler, on a package of two modules


def has_compiler() -> bool:
    """Return whether this machine can compile; the environment of the script is there after `make compile`."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which("cc") is not None and headers.exists() and COMPILER.exists()


COMPILER = ROOT / ".venv-compile" / "bin" / "python"
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="run `make compile` first; it needs a C compiler")

FAULTS = '''"""Exceptions."""


class Fault(Exception):
    """One with a property that a subclass overrides."""

    @property
    def reason(self) -> str:
        return "fault"


class Worse(Fault):
    """The subclass."""

    @property
    def reason(self) -> str:
        return "worse"
'''
READING = '''"""Reads exceptions."""

from lucid_compute.faults import Fault


def reason_of(fault: Fault) -> str:
    """Return the reason, by way of the compiled property if there is one."""
    return fault.reason
'''


class SmallProject(NamedTuple):
    """A checkout with the script, and an environment with the package."""

    root: Path
    python: Path
    builds: Path

    def compile(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script."""
        command: list[str | Path] = [COMPILER, self.root / "scripts" / "compile.py", self.python, *options]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.defpath, **environment},
            start_new_session=True,
        )

    def run(self, code: str) -> str:
        """Return what code prints that runs beside the package."""
        command: list[str | Path] = [self.python, "-c", f"import lucid_compute; {code}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout.strip()

    @property
    def made(self) -> set[str]:
        """The names of what the folder of builds has."""
        return {path.name for path in self.builds.iterdir()} - {NEWEST}


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    """A package of two modules, of which one has an exception with properties."""
    package = tmp_path / "src" / "lucid_compute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from lucid_compute.compilation import FORM as FORM\n")
    shutil.copy(ROOT / "src" / "lucid_compute" / "compilation.py", package)
    (package / "faults.py").write_text(FAULTS)
    (package / "reading.py").write_text(READING)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    rules = '[tool.lucid.compile]\npackages = []\nmodules = ["faults", "reading"]\n[tool.lucid.compile.except]\n'
    (tmp_path / "pyproject.toml").write_text(rules)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(f"{tmp_path / 'src'}\n")
    return SmallProject(tmp_path, tmp_path / "venv" / "bin" / "python", builds_of(str(tmp_path / "venv")))


READ = "from lucid_compute import faults, reading; print(reading.reason_of(faults.Worse()), reading.__file__[-3:])"


@needs_compiler
def test_a_module_of_exceptions_with_properties_stays_as_it_is(project: SmallProject) -> None:
    """Compiled, it crashes the process: docs/adr/0020-compiled.md."""
    done = project.compile()
    assert done.communicate()[1] == ""
    assert project.run(READ) == "worse .so"
    assert project.run("from lucid_compute import faults; print(faults.__file__[-3:])") == ".py"
    listed, _ = project.compile("--list").communicate()
    assert "- lucid_compute.faults: Fault is an exception with a property, whose compiled code crashes" in listed


@needs_compiler
def test_two_compilations_at_once_make_one_build(project: SmallProject) -> None:
    both = [project.compile(), project.compile()]
    said = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said[0].startswith("compiling 1 modules")
    assert said[1] == "waiting for another compilation\n"
    assert len(project.made) == 1


@needs_compiler
def test_an_edited_source_is_run_and_its_build_replaces_the_old_one(project: SmallProject) -> None:
    """Unless a process runs the old one, which then stays until the next time."""
    project.compile().communicate()
    (first,) = project.made
    source = project.root / "src" / "lucid_compute" / "reading.py"
    source.write_text(READING.replace("return fault.reason", 'return f"{fault.reason}!"'))
    assert project.run(READ) == "worse! .py"
    source.write_text(READING)
    assert project.run(READ) == "worse .so"
    waiting = subprocess.Popen(
        [project.python, "-c", "import lucid_compute; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={},
    )
    assert waiting.stdout is not None
    waiting.stdout.readline()
    source.write_text(READING.replace("return fault.reason", 'return f"{fault.reason}!"'))
    assert project.compile().communicate()[1] == ""
    assert project.run(READ) == "worse! .so"
    assert first in project.made
    waiting.communicate(b"\n")
    project.compile().communicate()
    assert first not in project.made
    assert len(project.made) == 1


@needs_compiler
def test_a_compilation_that_is_killed_leaves_nothing_that_is_used(project: SmallProject) -> None:
    process = project.compile()
    deadline = time.monotonic() + 60
    while not (project.builds.exists() and any(project.builds.glob("unfinished-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert project.run("print(lucid_compute.FORM.is_compiled)") == "False"
    assert project.compile().communicate()[1] == ""
    assert project.run(READ) == "worse .so"
    assert not any(name.startswith("unfinished-") for name in project.made)


@needs_compiler
@pytest.mark.parametrize(("options", "status"), [((), 1), (("--if-possible",), 0)])
def test_without_a_compiler_one_sentence_says_so(project: SmallProject, options: tuple[str, ...], status: int) -> None:
    process = project.compile(*options, CC="/nowhere/cc")
    _, said = process.communicate()
    assert process.returncode == status
    assert said.startswith("lucid-compute: there is no C compiler (/nowhere/cc), so the service stays interpreted")
    assert said.count("\n") == 1


@needs_compiler
def test_sources_that_mypyc_refuses_leave_the_former_build(project: SmallProject) -> None:
    project.compile().communicate()
    made = project.made
    (project.root / "src" / "lucid_compute" / "reading.py").write_text("class Reading:\n    one = two = 1\n")
    process = project.compile()
    _, said = process.communicate()
    assert process.returncode == 1
    assert "mypyc refused the sources" in said
    assert "Multiple assignment in class bodies not supported" in said
    assert project.made == made
    assert project.run("print(lucid_compute.FORM.reason)") == "the sources changed since they were compiled"
