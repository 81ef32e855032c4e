"""The rules of the code's layout (CONTRIBUTING.md, "Layout"). Each rule is one test that lists its offenders."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests import ROOT

SOURCE = ROOT / "src" / "lucid_compute"
PACKAGE = "lucid_compute"

# From the lowest layer to the highest: a package imports itself and lower layers. Packages of one layer are strangers.
LAYERS: list[set[str]] = [
    {"compilation"},
    {"wire"},
    {"errors"},
    {"tunnel"},
    {"egress"},
    {"postgres", "web"},
    {"registry"},
    {"accounting", "webhooks"},
    {"gateway"},
    {"server", "client"},
    {"agent"},
    {"cli"},
]
REGISTRY_LAYERS: list[set[str]] = [{"domain"}, {"matching_engine"}, {"fleet"}, {"keys"}]  # then the rest of registry/
# Packages that may import a library of the outside world; a pair names a file.
KEEPERS = {
    "sqlalchemy": {"postgres", "registry", "accounting", "webhooks", "migrations"},
    "asyncpg": {"postgres", "registry", "accounting", "webhooks"},
    "alembic": {"postgres"},
    "fastapi": {"web", "registry", "accounting", "webhooks", "gateway", "server"},
    "starlette": {"web", "registry", "gateway", "server"},
    "prometheus_client": {"server"},
    "opentelemetry": {"gateway"},
    "uvicorn": {"server"},
    "typer": {"cli"},
    "httptools": {"egress", "server"},
    "httpx": {"client", "agent"},
    "pynvml": {"agent"},
    "rich": {"cli"},
    "websockets": {"server", "agent"},
    "pydantic_settings": {"server", "agent"},
}
# Kinds of file by their name, and the libraries beside the standard one that they may import.
PURE_FILES = {
    "wire",
    "matching_engine",
    "routing_rules",
    "policy",
    "shapes",
    "rules",
    "revenue",
    "timeline",
    "series",
    "jobs",
    "measured",
}
PURE_LIBRARIES = {PACKAGE, "pydantic", "pydantic_core"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "manager", "base", "misc"}
CLOCKS = {"datetime.now", "datetime.utcnow", "time.time", "date.today"}
STOPWATCHES = {"time.monotonic", "time.perf_counter", "loop.time"}
# Below these files nothing measures time either; the feed and the broadcast wait between two reads.
TIMELESS = ("wire", "errors", "registry.domain", "registry.fleet", "registry.matching_engine", "registry.routing_rules")
TIMED = {"registry.fleet.change_feed", "registry.fleet.in_flight_broadcast"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 40
SMALL_FILE_LINES = 60
# Small files with one importer that stay apart, each with its reason.
SMALL_FILES = {
    "agent.runtimes.tgi": "one file a runtime",
    "agent.runtimes.vllm": "one file a runtime",
    "client.model_calls": "one file a resource of the API",
    "client.service_calls": "one file a resource of the API",
    "client.usage_calls": "one file a resource of the API",
    "gateway.probe_routes": "one file a subject's routes",
    "postgres.lean_sqlalchemy": "called before SQLAlchemy is imported, so it is in no file that imports it",
    "server.cors": "a middleware of its own, beside the application's routing",
    "server.dashboard.routes": "the dashboard's only file that knows FastAPI",
    "server.serve": "imported when `lucid serve` is called, so that other commands start without the server",
}
# The SDK raises the contract's errors under the names that the service has for them.
SAME_NAMES = {"client.errors"}


@cache
def tree_of(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text())


FILES = sorted(path for path in SOURCE.rglob("*.py") if "versions" not in path.parts)


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module, without the package's own name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return every module that a file imports, deferred imports among them; ours without the package's name."""
    return frozenset(_imports(tree_of(path)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name.removeprefix(f"{PACKAGE}.") in MODULES else module


def ours(path: Path) -> set[str]:
    """Return the modules of ours that a file imports."""
    prefix = f"{PACKAGE}."
    return {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}


def height(module: str, layers: list[set[str]], part: int) -> int:
    """Return the layer that a module is in; one above all for what no layer names."""
    parts = module.split(".")
    name = parts[part] if len(parts) > part else ""
    return next((number for number, layer in enumerate(layers) if name in layer), len(layers))


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function and method of a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def report(offenders: list[str], rule: str) -> None:
    """Fail with the offenders, one a line, when there are any."""
    assert not offenders, "\n".join([rule, *offenders])


def test_every_package_has_a_layer() -> None:
    """A new package is given its layer here, and in CONTRIBUTING.md."""
    named = set().union(*LAYERS) | {"", "__main__"}
    report(sorted({module.split(".")[0] for module in MODULES} - named), "These packages have no layer:")


def test_imports_go_down() -> None:
    """Imports go from a higher layer to a lower one; so they do inside the registry."""
    offenders = []
    for path in FILES:
        module = module_of(path)
        if module in {"", "__main__"}:
            continue
        for other in ours(path):
            if module.split(".")[0] == other.split(".")[0]:
                is_up = module.startswith("registry.") and height(other, REGISTRY_LAYERS, 1) > height(
                    module, REGISTRY_LAYERS, 1
                )
            else:
                is_up = height(other, LAYERS, 0) >= height(module, LAYERS, 0)
            if is_up and other:
                offenders.append(f"{module} imports {other}")
    report(sorted(offenders), "Imports must go down:")


def test_nothing_imports_in_a_circle() -> None:
    """Deferred imports count."""
    graph = {module_of(path): ours(path) & MODULES for path in FILES}
    done: set[str] = set()
    circles: list[str] = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph[module] - {module, ""}):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    report(circles, "These modules import each other in a circle:")


def test_imports_are_absolute() -> None:
    """A reader sees the whole path of what is imported."""
    offenders = [
        module_of(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    report(offenders, "Imports must be absolute:")


def test_a_library_is_imported_by_its_keepers_only() -> None:
    """A library of the outside world is replaced in few places."""
    offenders = []
    for path in FILES:
        package = module_of(path).split(".")[0]
        for imported in imports_of(path):
            keepers = KEEPERS.get(imported.split(".")[0])
            if keepers is not None and package not in keepers:
                offenders.append(f"{module_of(path)} imports {imported}")
    report(sorted(offenders), "Only these packages may import it (KEEPERS):")


def test_the_service_starts_without_its_extras() -> None:
    """`make run` installs requirements/runtime.txt alone: the packages of an extra are imported when they are used."""
    missing = "sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None"
    script = f"import sys; {missing}; import lucid_compute.server.serve, lucid_compute.cli.main"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_pure_files_import_pydantic_at_most() -> None:
    """Shapes, rules, the domain and the matching engine: standard library and Pydantic."""
    allowed = PURE_LIBRARIES | set(sys.stdlib_module_names)
    offenders = [
        f"{module_of(path)} imports {imported}"
        for path in FILES
        if path.stem in PURE_FILES or module_of(path) == "errors" or "domain" in path.parts
        for imported in imports_of(path)
        if imported.split(".")[0] not in allowed
    ]
    report(sorted(offenders), "These files must be pure:")


def test_the_domain_reads_no_clock() -> None:
    """Now is an argument below the server; `postgres.clock` tells the database's time."""
    offenders = [
        f"{module_of(path)} calls {ast.unparse(node.func)}"
        for path in FILES
        if module_of(path).split(".")[0] not in {"server", "client", "agent", "cli"} and path.stem != "clock"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CLOCKS
    ]
    offenders += [
        f"{module_of(path)} calls {ast.unparse(node.func)}"
        for path in FILES
        if module_of(path).startswith(TIMELESS) and module_of(path) not in TIMED
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in STOPWATCHES
    ]
    report(offenders, "The time must be an argument:")


def test_only_settings_files_read_the_environment() -> None:
    """`lucid settings` lists every setting, so no other file may read one."""
    offenders = [
        module_of(path)
        for path in FILES
        if path.stem not in {"settings", "main", "compilation"}  # the last runs before settings can be imported
        and ("os.environ" in path.read_text() or "getenv" in path.read_text())
    ]
    report(offenders, "Only settings.py may read the environment:")


def test_files_and_functions_are_as_long_as_their_subject() -> None:
    """A file has at most 500 lines, a function at most 40."""
    offenders = [
        f"{module_of(path)}: {count} lines"
        for path in FILES
        if (count := path.read_text().count("\n")) > MAX_FILE_LINES
    ]
    for path in FILES:
        for function in functions_of(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                offenders.append(f"{module_of(path)}.{function.name}: {length} lines")
    report(offenders, "These are too long:")


def test_a_small_file_has_more_than_one_importer() -> None:
    """A file under 60 lines that one file imports is a part of that file; SMALL_FILES names those with a reason."""
    importers: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for other in ours(path):
            importers[other].add(module_of(path))
    offenders = [
        f"{module_of(path)} is imported by {next(iter(importers[module_of(path)]))} alone"
        for path in FILES
        if path.name != "__init__.py"
        and path.read_text().count("\n") < SMALL_FILE_LINES
        and len(importers[module_of(path)]) == 1
        and module_of(path) not in SMALL_FILES
    ]
    report(offenders, "Merge these, or give a reason in SMALL_FILES:")


def test_no_file_is_named_for_nothing() -> None:
    """No utils, helpers, common, manager or base."""
    report([module_of(path) for path in FILES if path.stem in FORBIDDEN_NAMES], "Name these for what they hold:")


def test_no_class_name_stands_twice() -> None:
    """Whoever looks for a class finds one."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        if module_of(path) not in SAME_NAMES:
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(module_of(path))
    offenders = [f"{name}: {', '.join(modules)}" for name, modules in sorted(places.items()) if len(modules) > 1]
    report(offenders, "These class names stand twice:")


@cache
def compiled_and_left_out() -> tuple[frozenset[Path], dict[Path, str]]:
    """Return the files that `make compile` compiles, and the others of the same packages with the reason of each."""
    script = runpy.run_path(str(ROOT / "scripts" / "compile.py"))
    selection = script["select"](SOURCE)
    return frozenset(selection.compiled), selection.left_out


def test_the_busiest_modules_are_compiled() -> None:
    """What every request passes stays compilable; the rest of its package may have a reason not to be."""
    compiled, left_out = compiled_and_left_out()
    offenders = [
        f"{module_of(path)}: {left_out.get(path, 'no package in pyproject.toml has it')}"
        for path in FILES
        if is_busy(path) and path not in compiled
    ]
    report(offenders, "Keep these compiled (docs/adr/0020-compiled.md):")


def is_busy(path: Path) -> bool:
    """Return whether every completion or heartbeat passes through a file, or every read of the fleet."""
    return module_of(path) in {
        "accounting.jobs",
        "accounting.ledger",
        "egress.connection",
        "gateway.attempt",
        "gateway.dispatcher",
        "gateway.event_stream",
        "gateway.lane",
        "gateway.request",
        "registry.fleet.fleet",
        "registry.heartbeat_lane",
        "registry.heartbeat_writer",
        "registry.keys.authentication",
        "registry.matching_engine",
        "server.fast_path",
        "server.http_protocol",
    }


def test_compiled_classes_declare_what_mypyc_needs() -> None:
    """One attribute an assignment, literals as defaults, and `__deletable__` for what is deleted."""
    offenders = []
    for path in sorted(compiled_and_left_out()[0]):
        text, tree = path.read_text(), tree_of(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.decorator_list and not is_ordinary(node.name):
                offenders += [f"{module_of(path)}.{node.name}, line {line}" for line in _unfit_defaults(node)]
            for target in node.targets if isinstance(node, ast.Delete) else ():
                if isinstance(target, ast.Attribute) and f'__deletable__ = ("{target.attr}",)' not in text:
                    offenders.append(f"{module_of(path)} deletes {target.attr}, line {target.lineno}")
    report(offenders, "mypyc would refuse these, or make something else of them (docs/adr/0020-compiled.md):")


def _unfit_defaults(node: ast.ClassDef) -> Iterator[int]:
    for part in node.body:
        if isinstance(part, ast.Assign) and len(part.targets) > 1:
            yield part.lineno
        elif isinstance(part, ast.Assign | ast.AnnAssign) and part.value is not None:
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            is_class_variable = isinstance(part, ast.AnnAssign) and ast.unparse(part.annotation).startswith("ClassVar")
            is_special = ast.unparse(targets[0]).startswith("__") or is_class_variable
            value = part.value.operand if isinstance(part.value, ast.UnaryOp) else part.value
            if not is_special and not isinstance(value, ast.Constant):
                yield part.lineno


@cache
def bases_of_classes() -> dict[str, set[str]]:
    """Return the names of the bases of each class; no class name stands twice."""
    return {
        node.name: {ast.unparse(base).split("[")[0] for base in node.bases}
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }


def is_ordinary(name: str) -> bool:
    """Return whether mypyc makes an ordinary Python class of a class."""
    ordinary = {"NamedTuple", "Protocol", "TypedDict", "Enum", "StrEnum", "IntEnum", "IntFlag", "Flag"}
    return any(base in ordinary or is_ordinary(base) for base in bases_of_classes().get(name, ()))


def test_no_interpreted_class_derives_from_a_compiled_one() -> None:
    """Python refuses that when the module is imported, in the compiled service alone."""
    compiled, _ = compiled_and_left_out()
    native = {
        node.name
        for path in compiled
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and not is_ordinary(node.name)
    }
    offenders = [
        f"{module_of(path)}.{node.name} derives from {name}"
        for path in FILES
        if path not in compiled
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
        for name in bases_of_classes()[node.name] & native
    ]
    report(offenders, "Compile these too, or leave out what they derive from:")


def test_a_predicate_changes_nothing() -> None:
    """What is called is_, has_, may_ or can_ is asked, and assigns to nothing but its own variables."""
    offenders = [
        f"{module_of(path)}.{function.name}, line {node.lineno}"
        for path in FILES
        for function in functions_of(path)
        if function.name.lstrip("_").startswith(("is_", "has_", "may_", "can_"))
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete)
        for target in ([node.target] if isinstance(node, ast.AugAssign) else node.targets)
        if isinstance(target, ast.Attribute | ast.Subscript)
    ]
    report(offenders, "These predicates change something:")


def test_docstrings_say_return() -> None:
    """Docstrings use the field's word: a function returns, it does not answer."""
    offenders = [
        f"{module_of(path)}.{getattr(node, 'name', '')}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and (ast.get_docstring(node) or "").startswith(("Answer ", "Answers "))
    ]
    report(offenders, "Begin these docstrings with Return, or with what the function does:")


def test_every_lint_exception_says_why() -> None:
    """A `noqa` names its rule and its reason, a `type: ignore` its rule."""
    offenders = []
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "# noqa" in line and not ("# noqa: " in line and " - " in line.split("# noqa: ")[1]):
                offenders.append(f"{module_of(path)}:{number} gives no reason")
            if "# type: ignore" in line and "# type: ignore[" not in line:
                offenders.append(f"{module_of(path)}:{number} names no rule")
    report(offenders, "These exceptions need a rule and a reason:")
