"""Compile the service's busiest modules with mypyc, for the Python environment that runs the service.

Runs in an environment of its own, with what requirements/compile.txt locks. `pyproject.toml` names the packages, and
`select` leaves out the modules that mypyc can't compile. The result is a folder below the environment's `lib/`. Its
name is the hash of the sources, of how they are compiled and of the Python. `lucid_compute/compilation.py` imports from
it as long as the sources are unchanged.
"""

from __future__ import annotations

import argparse
import ast
import collections.abc
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lucid_compute"
GROUP = PACKAGE  # mypyc appends `__mypyc` to the name of the library that all modules share
COMPILATION = "compilation.py"  # of the package: runs before there is anything compiled
OPTIMISATION = "2"
# Warnings of mypyc after which compiled code does something else than its source.
WRONG = ("Unsupported default attribute value",)
ASK = f"""
import os, sys
os.environ["LUCID_COMPILED"] = "0"
import {PACKAGE}
from {PACKAGE} import compilation
print(os.path.dirname({PACKAGE}.__file__), compilation.builds_of(sys.prefix), compilation.python_tag(), sep="\\n")
"""
LOAD = f"""
import faulthandler, importlib, os, sys
from pathlib import Path
faulthandler.enable()
os.environ["LUCID_COMPILED"] = "0"
from {PACKAGE} import compilation
for name in sorted(compilation.use_build(Path(sys.argv[1])).names):
    file = importlib.import_module(name).__file__
    assert file.startswith(sys.argv[1]), f"{{name}} was imported from {{file}}"
"""


class NotCompiled(Exception):
    """Why nothing was compiled, in a sentence. `is_lack`: a C compiler or Python's headers are missing."""

    def __init__(self, sentence: str, *, is_lack: bool = False) -> None:
        super().__init__(sentence)
        self.is_lack = is_lack


class Environment(NamedTuple):
    """The Python environment that runs the service: its copy of the package, its builds, its Python."""

    python: Path
    package: Path
    builds: Path
    tag: str


class Selection(NamedTuple):
    """The modules to compile, and those of the same packages that stay as they are, each with its reason."""

    compiled: list[Path]
    left_out: dict[Path, str]


# --- which modules


def select(package: Path, project: Path = ROOT / "pyproject.toml") -> Selection:
    """Return which modules of the package are compiled, by `[tool.lucid.compile]`."""
    rules = tomllib.loads(project.read_text())["tool"]["lucid"]["compile"]
    wanted = sorted(
        [path for name in rules["packages"] for path in (package / name).rglob("*.py") if path.name != "__init__.py"]
        + [package / f"{name}.py" for name in rules["modules"]]
    )
    bases = _bases_of_classes(package)
    left_out = {path: reason for path in wanted if (reason := next(_reasons(path, bases), None))}
    left_out |= {package / f"{name}.py": reason for name, reason in rules["except"].items()}
    return Selection([path for path in wanted if path not in left_out], left_out)


def _bases_of_classes(package: Path) -> dict[str, set[str]]:
    """Return the names of the bases of each class. No class name stands twice (tests/test_house_rules.py)."""
    return {
        node.name: {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def _roots(name: str, bases: dict[str, set[str]]) -> set[str]:
    """Return the classes of others from which a class derives, directly or not."""
    if name not in bases:
        return {name}
    return set().union(*(_roots(base, bases) for base in bases[name] - {name}))


def _reasons(path: Path, bases: dict[str, set[str]]) -> Iterator[str]:
    """Yield why mypyc can't compile a module rightly."""
    tree = ast.parse(path.read_text())
    if early := _find_early_name(tree, bases):
        yield early
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            roots = _roots(node.name, bases)
            if roots & {"BaseModel", "BaseSettings", "RootModel"}:
                yield f"{node.name} is a Pydantic model"
            if any(root.endswith(("Exception", "Error")) for root in roots) and _has_property(node):
                yield f"{node.name} is an exception with a property, whose compiled code crashes"
            if roots & set(collections.abc.__all__):
                yield f"{node.name} derives from an abstract class, and would take the instances of that for its own"
        elif isinstance(node, ast.AsyncFunctionDef) and _yields(node):
            yield f"{node.name} is an asynchronous generator"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastapi":
            yield "FastAPI reads its annotations"
        elif isinstance(node, ast.Name) and node.id == "__file__":
            yield "it reads __file__"


def _find_early_name(tree: ast.Module, bases: dict[str, set[str]]) -> str | None:
    """Return which class, whose annotations exist at run time, names one that is defined below it: loading crashes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = {node.name: node.lineno for node in classes}
    for node in classes:
        if node.decorator_list or _roots(node.name, bases) & {"NamedTuple", "TypedDict", "Protocol"}:
            annotations = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
            for name in (each for annotation in annotations for each in ast.walk(annotation)):
                if isinstance(name, ast.Name) and lines.get(name.id, 0) > node.lineno:
                    return f"{node.name} names {name.id}, which is defined below it"
    return None


def _has_property(node: ast.ClassDef) -> bool:
    decorators = [ast.unparse(each) for part in node.body for each in getattr(part, "decorator_list", [])]
    return any(name == "property" or name.endswith((".setter", "cached_property")) for name in decorators)


def _yields(function: ast.AsyncFunctionDef) -> bool:
    """Return whether the function itself yields, and not only a function inside of it."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return False


def module_name(package: Path, path: Path) -> str:
    """Return the dotted name of a module of the package."""
    return ".".join(path.relative_to(package.parent).with_suffix("").parts)


# --- the build


def main() -> int:
    """Compile if there is no build of these sources yet; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("python", type=Path, help="the interpreter of the environment that runs the service")
    parser.add_argument("--if-possible", action="store_true", help="end with status 0 without a C compiler")
    parser.add_argument("--list", action="store_true", help="list what is compiled, and why the rest is not")
    options = parser.parse_args()
    try:
        environment = _ask(Path.cwd() / options.python)  # not resolved: that would lead out of it
        if options.list:
            _print(select(environment.package), environment.package)
        else:
            make_build(environment)
    except NotCompiled as reason:
        print(f"lucid-compute: {reason}", file=sys.stderr)
        return 0 if reason.is_lack and options.if_possible else 1
    return 0


def make_build(environment: Environment) -> None:
    """Make a build of the present sources the newest one, and compile it if that was not done before."""
    _check_compiler()
    with _alone(environment.builds):
        _remove(environment.builds.glob("unfinished-*"))
        lines = _source_lines(environment.package)
        selection = select(environment.package)
        key = f"{environment.tag}-{_hash(lines, selection, environment)}"
        folder = environment.builds / key
        if not (folder / "sources").exists():
            _compile(environment, selection, folder, lines)
        _replace(folder / "sources", "".join(lines))  # the times may have changed, with the same contents
        _point_to(environment.builds / "newest", key)
        _remove(path for path in environment.builds.iterdir() if path.is_dir() and path.name not in {key, "newest"})


def _compile(environment: Environment, selection: Selection, folder: Path, lines: list[str]) -> None:
    """Compile aside, load every module once, and move the result to `folder`."""
    print(f"compiling {len(selection.compiled)} modules for {environment.tag}, which takes minutes", flush=True)
    aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=environment.builds))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _build_modules(environment, selection, Path(scratch), aside)
        done = subprocess.run(
            [environment.python, "-c", LOAD, aside], check=False, capture_output=True, text=True, cwd=aside
        )
        if done.returncode:
            raise NotCompiled(
                f"the compiled modules can't be loaded (status {done.returncode}):\n{done.stderr.strip()}"
            )
        if _source_lines(environment.package) != lines:
            raise NotCompiled("the sources changed while they were compiled. Run it again")
        aside.chmod(0o755)  # whoever makes it, the service's user reads it
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _build_modules(environment: Environment, selection: Selection, scratch: Path, output: Path) -> None:
    """Write the modules and the library that they share to `output`."""
    from setuptools._distutils import ccompiler  # noqa: PLC0415 - distutils' successor
    from setuptools._distutils import sysconfig as settings  # noqa: PLC0415 - as above

    log = scratch / "mypyc.log"
    extensions = _write_c(environment, selection, scratch, log)
    compiler = ccompiler.new_compiler()
    settings.customize_compiler(compiler)
    compiler.add_include_dir(sysconfig.get_paths()["include"])

    def translate(extension: object, source: str) -> list[str]:
        return compiler.compile(
            [source],
            output_dir=str(scratch / "objects"),
            include_dirs=extension.include_dirs,
            extra_postargs=[*extension.extra_compile_args, "-g0"],
        )

    os.chdir(scratch)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pending = [(each, [pool.submit(translate, each, source) for source in each.sources]) for each in extensions]
        try:
            for extension, tasks in pending:
                objects = [path for task in tasks for path in task.result()]
                compiler.link_shared_object(objects, str(output / f"{extension.name}.so"))
        except ccompiler.CompileError as error:
            pool.shutdown(cancel_futures=True)
            raise NotCompiled(f"the C compiler failed: {error}") from error


def _write_c(environment: Environment, selection: Selection, scratch: Path, log: Path) -> list[object]:
    """Check the types, and write the modules as C; return what the C compiler has to make of it."""
    from mypyc.build import mypycify  # noqa: PLC0415

    os.chdir(environment.package.parent)
    (scratch / "mypy.ini").write_text("[mypy]\n")  # the types were checked by `make check`, with the project's settings
    options = ["--strict", "--follow-imports=silent", "--config-file", str(scratch / "mypy.ini")]
    options += ["--cache-dir", str(scratch / "cache")]
    options += ["--python-executable", str(environment.python)]
    paths = [str(path.relative_to(environment.package.parent)) for path in selection.compiled]
    try:
        with log.open("w") as file, redirect_stdout(file):
            extensions = mypycify(
                [*options, *paths],
                opt_level=OPTIMISATION,
                multi_file=True,
                debug_level="0",
                target_dir=str(scratch),
                group_name=GROUP,
            )
    except SystemExit as end:
        raise NotCompiled(f"mypyc refused the sources:\n{_complaints(log)}") from end
    if wrong := [line for line in log.read_text().splitlines() if any(warning in line for warning in WRONG)]:
        raise NotCompiled("\n".join(["compiled code would differ from its source:", *wrong]))
    return extensions


def _complaints(log: Path) -> str:
    return "\n".join(line for line in log.read_text().splitlines() if ": error: " in line or ": note: " in line)


def _source_lines(package: Path) -> list[str]:
    """Return the lines of the package's sources, as `compilation.py` reads them."""
    compilation = _load_compilation(package)
    paths = sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))
    return [str(compilation.SourceLine.of(package, path)) for path in paths]


def _load_compilation(package: Path) -> object:
    """Return the package's module, loaded alone."""
    from importlib.util import module_from_spec, spec_from_file_location  # noqa: PLC0415

    spec = spec_from_file_location("compilation", package / COMPILATION)
    module = module_from_spec(spec)
    sys.modules["compilation"] = module
    spec.loader.exec_module(module)
    return module


def _hash(lines: list[str], selection: Selection, environment: Environment) -> str:
    """Return a short hash of the sources' contents and of how they are compiled."""
    contents = [line.split(" ")[0] + line.split(" ", 3)[3] for line in lines]
    names = [str(path.relative_to(environment.package)) for path in selection.compiled]
    how = [version("mypy"), OPTIMISATION, Path(__file__).read_text(), sysconfig.get_platform()]
    return hashlib.sha256("\n".join([*contents, *names, *how]).encode()).hexdigest()[:20]


# --- surroundings


def _ask(python: Path) -> Environment:
    """Return the environment of an interpreter in which the package is installed."""
    done = subprocess.run([python, "-I", "-c", ASK], check=False, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise NotCompiled(f"{python} has no {PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
    package, builds, tag = done.stdout.splitlines()
    ours = f"{sys.implementation.cache_tag}{sys.abiflags}"
    if tag != ours:
        raise NotCompiled(f"{python} is {tag}, and this script runs on {ours}")
    return Environment(python, Path(package), Path(builds), tag)


def _check_compiler() -> None:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        raise NotCompiled(
            f"there is no C compiler ({compiler}), so the service stays interpreted, which works and is slower. "
            "Debian and Ubuntu: apt-get install gcc libc6-dev",
            is_lack=True,
        )
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists():
        raise NotCompiled(
            f"there is no {headers}, so the service stays interpreted, which works and is slower. "
            f"Debian and Ubuntu: apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev",
            is_lack=True,
        )


@contextmanager
def _alone(builds: Path) -> Iterator[None]:
    """Wait for another compilation for the same environment."""
    builds.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(builds, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another compilation", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove(folders: Iterable[Path]) -> None:
    """Remove old builds, except those that a running process holds (`compilation.py`)."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _replace(file: Path, text: str) -> None:
    """Write a file so that its readers see all of it or its predecessor."""
    aside = file.with_name(f"{file.name}.new")
    aside.write_text(text)
    aside.replace(file)


def _point_to(link: Path, target: str) -> None:
    aside = link.with_name(f"{link.name}.new")
    with suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(target)
    aside.replace(link)


def _print(selection: Selection, package: Path) -> None:
    for path in selection.compiled:
        print(module_name(package, path))
    for path, reason in selection.left_out.items():
        print(f"- {module_name(package, path)}: {reason}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
