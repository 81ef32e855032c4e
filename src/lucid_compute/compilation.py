"""Imports the modules that `scripts/compile.py` compiled, if they were compiled from the sources that are here.

It runs before every other module, so it imports the standard library alone, and little of that.
"""

from __future__ import annotations

import fcntl
import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import NamedTuple

SETTING = "LUCID_COMPILED"
SUFFIX = ".so"
SOURCES = "sources"  # the list of the sources that a build was made from
PYTHON = ".".join(map(str, sys.version_info[:3]))
NEWEST = "newest"  # the link to the build that is used
_NO = frozenset({"0", "false", "f", "no", "n", "off"})  # as Pydantic reads a boolean


class Form(NamedTuple):
    """Whether this process runs compiled modules, and the reason if it doesn't."""

    is_compiled: bool
    reason: str = ""

    def __str__(self) -> str:
        """Return `Python 3.11.7, compiled`, or the reason why it is interpreted."""
        return f"Python {PYTHON}, " + ("compiled" if self.is_compiled else f"interpreted ({self.reason})")


class SourceLine(NamedTuple):
    """What a build knows of one source: its digest, and the size and the time that it had then."""

    digest: str
    size: int
    mtime_ns: int
    path: str

    @classmethod
    def parse(cls, line: str) -> SourceLine:
        """Return what a line of the list says."""
        digest, size, mtime_ns, path = line.rstrip("\n").split(" ", 3)
        return cls(digest, int(size), int(mtime_ns), path)

    @classmethod
    def of(cls, package: Path, path: str) -> SourceLine:
        """Return the line of a source of the package."""
        before = (package / path).stat()
        return cls(_digest(package / path), before.st_size, before.st_mtime_ns, path)

    def __str__(self) -> str:
        """Return the line of the list."""
        return f"{self.digest} {self.size} {self.mtime_ns} {self.path}\n"

    def is_current(self, package: Path) -> bool:
        """Return whether the source is what it was. It is read only if its size or its time differ."""
        found = os.stat(f"{package}/{self.path}")  # noqa: PTH116 - at each start, for 260 files: Path takes twice as long
        if (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns):
            return True
        return found.st_size == self.size and _digest(package / self.path) == self.digest


class CompiledModules:
    """Finds compiled modules for `import`, before their sources are found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names = {name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX)}  # noqa: PTH208 - names

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Return where a module is, if it is compiled."""
        if fullname not in self.names:
            return None
        file = f"{self._folder}/{fullname}{SUFFIX}"
        return spec_from_file_location(fullname, file, loader=ExtensionFileLoader(fullname, file))


def builds_of(prefix: str) -> Path:
    """Return the folder of all builds for the Python environment at `prefix`. Each build is named by its key."""
    return Path(prefix, "lib", "lucid_compute_compiled")


def python_tag() -> str:
    """Return the version of Python that a build is for, such as `cpython-311`."""
    return f"{sys.implementation.cache_tag}{sys.abiflags}"


def use_build(folder: Path) -> CompiledModules:
    """Import the modules of a build from now on."""
    modules = CompiledModules(folder)
    sys.meta_path.insert(0, modules)
    return modules


def find_build(prefix: str, package: Path, setting: str = "") -> tuple[Path | None, str]:
    """Return the newest build if this Python can use it for the sources in `package`; else None and the reason.

    `setting` is the value of LUCID_COMPILED. The build is kept from being removed while this process runs.
    """
    if setting.strip().lower() in _NO:
        return None, f"as {SETTING} says"
    builds = builds_of(prefix)
    try:
        build = builds / (builds / NEWEST).readlink()
        if not build.name.startswith(f"{python_tag()}-"):
            return None, "it is compiled for another Python"
        hold(build)
        with (build / SOURCES).open() as lines:
            is_current = all(SourceLine.parse(line).is_current(package) for line in lines)
    except FileNotFoundError:
        is_current = False
        if not (builds / NEWEST).exists():
            return None, "not compiled"
    except (OSError, ValueError) as error:
        return None, f"what is compiled can't be used: {error}"
    return (build, "") if is_current else (None, "the sources changed since they were compiled")


def hold(build: Path) -> None:
    """Keep the build from being removed while this process, or one that it forks, runs.

    Raises:
        OSError: it is being removed, or can't be locked.
    """
    fcntl.flock(os.open(build, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _use_newest() -> Form:
    """Use the newest build, if that is possible; return the form."""
    build, reason = find_build(sys.prefix, Path(__file__).parent, os.environ.get(SETTING, ""))
    if build is None:
        return Form(is_compiled=False, reason=reason)
    use_build(build)
    return Form(is_compiled=True)


def _digest(path: Path) -> str:
    from hashlib import sha256  # noqa: PLC0415 - a start that finds its sources unchanged does not need it

    return sha256(path.read_bytes()).hexdigest()


FORM = _use_newest()
