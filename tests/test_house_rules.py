"""The house rules, enforced on the code as it stands: who may import what, how long files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

SOURCE = ROOT / "src" / "lucid_compute"
PACKAGE = "lucid_compute"

# Downward only. Ground holds values and pure rules; each room may import the rooms named here, and itself.
ROOMS: dict[str, set[str]] = {
    "ground": set(),
    "wire": {"ground"},
    "fleet": {"ground", "wire"},
    "storage": {"ground", "wire", "fleet"},
    "egress": {"ground"},
    "inference": {"ground", "wire", "fleet", "storage", "egress"},
    "webhooks": {"ground", "wire", "fleet", "storage", "egress"},
    "dashboard": set(),
    "api": {"ground", "wire", "fleet", "storage", "egress", "inference", "webhooks", "dashboard"},
    "client": {"ground", "wire"},
    "agent": {"ground", "wire", "client"},
    "doctor": {"ground", "wire", "client", "agent"},
    "cli": {
        "ground",
        "wire",
        "fleet",
        "storage",
        "egress",
        "inference",
        "webhooks",
        "api",
        "client",
        "agent",
        "doctor",
    },
}
# A library of the outside world stands behind one room only.
KEEPERS = {
    "sqlalchemy": {"storage"},
    "asyncpg": {"storage"},
    "alembic": {"storage"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "prometheus_client": {"api"},
    "opentelemetry": {"api"},
    "uvicorn": {"cli"},
    "typer": {"cli"},
    "httptools": {"egress", "cli"},
    "httpx": {"client", "agent"},
    "pynvml": {"agent"},
    "rich": {"cli"},
    "pydantic_settings": {"api", "agent"},
}
GROUND_MAY_IMPORT_FROM_OUTSIDE = {"pydantic"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "manager", "base", "misc"}
CLOCKS = {"datetime.now", "datetime.utcnow", "time.time", "time.monotonic", "date.today"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 40

FILES = sorted(path for path in SOURCE.rglob("*.py") if "versions" not in path.parts)


def room_of(path: Path) -> str:
    """The room that a file stands in."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else "ground"


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, deferred imports among them, and names that may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name in MODULES else module


MODULES = {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    """Rooms: api → inference → storage → fleet → wire → ground; doctor → agent → client → wire; cli on top."""
    room = room_of(path)
    for imported in imports_of(path):
        if imported.startswith(f"{PACKAGE}."):
            parts = imported.split(".")
            other = parts[1] if parts[1] in ROOMS else "ground"
            assert other == room or other in ROOMS[room], f"{room} may not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_library_is_imported_by_its_keeper_only(path: Path) -> None:
    """Only storage knows SQLAlchemy and asyncpg; ground knows Pydantic and the standard library alone."""
    import sys

    room = room_of(path)
    for imported in imports_of(path):
        top = imported.split(".")[0]
        assert room in KEEPERS.get(top, {room}), f"{room} may not import {imported}"
        if room in {"ground", "wire"}:
            allowed = top == PACKAGE or top in sys.stdlib_module_names or top in GROUND_MAY_IMPORT_FROM_OUTSIDE
            assert allowed, f"{room} may not import {imported}"


def test_nothing_imports_in_a_circle() -> None:
    """Deferred imports count: a circle is a circle."""
    graph = {module_of(path): {name for name in imports_of(path) if name in MODULES} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' → '.join([*trail, module])}"
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_is_small_and_named_for_what_it_does(path: Path) -> None:
    """At most 500 lines, functions of at most 40, and no file called utils or the like."""
    assert path.stem not in FORBIDDEN_NAMES
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_time_is_an_argument_below_storage(path: Path) -> None:
    """Ground, wire and fleet read no clock; the database's clock lives in storage."""
    if room_of(path) in {"ground", "wire", "fleet"}:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not {ast.unparse(call) for call in calls} & CLOCKS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_settings_files_read_the_environment(path: Path) -> None:
    """What can be set is listed by `lucid settings`; nothing else looks at variables of ours."""
    if path.stem != "settings" and path.name != "main.py":
        text = path.read_text()
        assert "os.environ" not in text
        assert "getenv" not in text


def test_every_lint_exception_says_why() -> None:
    """A `noqa` or a `type: ignore` names its rule, and a `noqa` its reason."""
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "# noqa" in line:
                assert "# noqa: " in line, f"{path}:{number}"
                assert " - " in line.split("# noqa: ")[1], f"{path}:{number} gives no reason"
            if "# type: ignore" in line:
                assert "# type: ignore[" in line, f"{path}:{number}"
