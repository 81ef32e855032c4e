"""What is installed, built and shipped: the locks, the wheel, the image and the workflow say the same."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import alembic
import pytest
import yaml  # type: ignore[import-untyped]

import lucid_compute
from lucid_compute.agent.fatal_errors import AgentFault
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.postgres import revisions
from tests import ROOT

PEERS = ("bench", "bench-smg", "bench-litellm")
LOCKS = tuple(f"requirements/{name}.txt" for name in ("runtime", "tracing", "dev", "compile", "docs", *PEERS))
DOCUMENTS = ("docker-compose.yml", ".pre-commit-config.yaml", ".github/workflows/ci.yml")
REQUIREMENT = re.compile(
    r"^([a-z0-9][a-z0-9.-]*)==(\S+)(?: ; (.+?))? \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.MULTILINE
)


def read(path: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads(read("pyproject.toml"))


def document(path: str) -> dict[str, Any]:
    """A YAML file."""
    loaded: dict[str, Any] = yaml.safe_load(read(path))
    return loaded


def pins(lock: str) -> dict[tuple[str, str], str]:
    """The version of each package in a lock, by its name and the marker it stands under."""
    return {(name, marker): version for name, version, marker in REQUIREMENT.findall(read(lock))}


def names(requirements: list[str]) -> set[str]:
    """The names of requirements, in the one spelling that locks use."""
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def oldest_python() -> str:
    """The oldest Python that pyproject.toml allows."""
    return str(project()["project"]["requires-python"]).removeprefix(">=")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_package_index_and_hashes_everything(lock: str) -> None:
    """Whoever installs uses their own index, and gets these files or none."""
    text = "".join(line for line in read(lock).splitlines(keepends=True) if not line.startswith("#"))
    assert pins(lock)
    assert not REQUIREMENT.sub("", text).strip()
    assert "://" not in read(lock)


def test_locks_agree_and_hold_what_the_project_asks_for() -> None:
    """The tests run on the very versions that the service is installed with."""
    runtime, tracing, dev, compiling, docs, *_ = (pins(lock) for lock in LOCKS)
    assert {name: tracing.get(name) for name in runtime} == runtime
    assert {name: dev.get(name) for name in tracing} == tracing
    groups = project()["dependency-groups"]
    asked = names(project()["project"]["dependencies"]) | names(groups["build"])
    assert asked <= {name for name, _ in runtime}
    assert asked | names(project()["project"]["optional-dependencies"]["tracing"]) <= {name for name, _ in tracing}
    assert asked | names(groups["dev"]) <= {name for name, _ in dev}
    assert names(groups["compile"]) <= {name for name, _ in compiling}
    assert names(groups["docs"]) <= {name for name, _ in docs}
    assert {name: compiling[name] for name in compiling.keys() & dev.keys()}.items() <= dev.items()
    assert names(project()["build-system"]["requires"]) == names(groups["build"])


def test_every_dependency_has_its_reason() -> None:
    """docs/dependencies.md says why each is here."""
    groups = project()["dependency-groups"]
    extras = project()["project"]["optional-dependencies"]
    required = [*project()["project"]["dependencies"], *extras["tracing"]]
    asked = names([*required, *groups["build"], *groups["compile"], *groups["dev"], *groups["docs"]])
    cells = re.findall(r"^\| (`.+?) \|", read("docs/dependencies.md"), re.MULTILINE)
    explained = names([name for cell in cells for name in re.findall(r"`([^`]+)`", cell)])
    assert explained == asked


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline by the backend that pyproject.toml names."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def build(kind: str, folder: Path) -> Path:
    """Build a wheel or an sdist into `folder`."""
    backend = project()["build-system"]["build-backend"]
    code = f"import sys; from {backend} import build_{kind}; print(build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    return folder / subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]


def files_below(folder: Path) -> set[str]:
    """The files of a folder of the repository, from there."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in files}


def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    """Migrations, their template, the types' marker and the licence are in it; tests are not."""
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {f"lucid_compute/{name}" for name in files_below(ROOT / "src" / "lucid_compute")}
    migrations = {f"lucid_compute/migrations/{name}" for name in files_below(ROOT / "migrations")}
    assert "lucid_compute/migrations/script.py.mako" in migrations
    assert {name for name in files if ".dist-info/" not in name} == package | migrations
    assert "lucid_compute/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert {name.split("/")[0].split("-")[0] for name in files} == {"lucid_compute"}


def test_the_source_archive_builds_the_same_wheel(tmp_path: Path, wheel: Path) -> None:
    """It holds the migrations where a clone has them, and the locks."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files_below(source / "migrations") == files_below(ROOT / "migrations")
    assert {"alembic.ini", "LICENSE", "README.md", *LOCKS} <= files_below(source)
    code = "from hatchling.build import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    assert zipfile.ZipFile(source / wheel.name).namelist() == zipfile.ZipFile(wheel).namelist()


def test_an_installed_wheel_migrates_by_itself(tmp_path: Path, wheel: Path, empty_url: str) -> None:
    """With the migrations that it carries; there is no clone beside it."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    packages = Path(alembic.__file__).parents[1]  # the locked ones; ours is not among them
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "locked.pth").write_text(f"{packages}\n")
    where = "from lucid_compute.postgres import revisions; print(revisions.migrations_folder())"
    ran = subprocess.run([python, "-I", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()) == site / "lucid_compute" / "migrations"
    environment = {"PATH": os.defpath, "LUCID_DATABASE_URL": empty_url}
    command = [str(python.with_name("lucid")), "db", "upgrade", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    stands = json.loads(ended.stdout)
    assert stands["revision"] == stands["neededRevision"] == revisions.head_revision()


def test_a_clone_migrates_with_the_folder_at_its_top() -> None:
    """Nothing of it lies in the package, where an editable install would leave a copy."""
    assert revisions.migrations_folder() == ROOT / "migrations"
    assert not (ROOT / "src" / "lucid_compute" / "migrations").exists()


@pytest.mark.parametrize("arguments", [["--version"], ["db", "--help"], ["serve", "--help"], ["no-such-command"]])
def test_python_runs_the_package_as_lucid(arguments: list[str]) -> None:
    """`python -m lucid_compute` says what `lucid` says, and ends with its status."""
    commands = [sys.executable, "-m", "lucid_compute"], [Path(sys.executable).with_name("lucid")]
    ran = [subprocess.run([*command, *arguments], capture_output=True, text=True, check=False) for command in commands]
    assert ran[0].returncode == ran[1].returncode
    assert (ran[0].stdout, ran[0].stderr) == (ran[1].stdout, ran[1].stderr)


def test_an_environment_that_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    """As after a kill while it was made; and where packages can't be had, pip's words end in one sentence of ours."""
    for path in ("Makefile", "pyproject.toml", "scripts", "requirements"):
        (tmp_path / path).symlink_to(ROOT / path)
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / ".venv")
    nowhere = {
        "PATH": os.defpath,
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = ["make", f"PYTHON={sys.executable}", "run"]
    ended = subprocess.run(command, cwd=tmp_path, env=nowhere, capture_output=True, text=True, check=False)
    assert (tmp_path / ".venv" / "bin" / "pip").exists()
    assert ended.returncode == 2
    assert "lucid-compute: pip could not install the packages" in ended.stderr
    assert "No module named pip" not in ended.stderr


def test_of_two_installations_in_one_folder_the_second_waits(tmp_path: Path) -> None:
    """`make run` and `make demo` on a fresh clone, in two terminals: each would wipe what the other has just made."""
    stamp, lock = tmp_path / ".venv" / ".installed", tmp_path / "none.txt"
    lock.touch()
    command = [sys.executable, str(ROOT / "scripts" / "install.py"), ".venv", str(lock), str(stamp)]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == [
        "installing what none.txt names into .venv, over the network\n",
        "waiting for another make that installs here\n",
    ]
    assert stamp.exists()


def test_the_version_is_the_newest_in_the_changelog() -> None:
    """One version, in the package; the changelog tells of it."""
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == lucid_compute.__version__


def test_one_range_of_pythons_stands_everywhere() -> None:
    """The project, the tools, the locks, the workflow and the README mean the same versions."""
    oldest = oldest_python()
    tested = document(".github/workflows/ci.yml")["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in range(int(oldest.split(".")[1]), int(tested[-1].split(".")[1]) + 1)]
    tools = project()["tool"]
    assert tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"--python-version {oldest} " in read("Makefile")
    assert f"Python {oldest} to {tested[-1]}" in read("README.md")
    assert f"Python {oldest} to {tested[-1]}" in read("Makefile")
    assert set(re.findall(r"^FROM python:([\d.]+)-slim", read("Dockerfile"), re.MULTILINE)) <= set(tested)


def test_the_workflow_runs_what_everybody_runs() -> None:
    """CI is `.ci/run` on each Python, and `make test` on each Postgres that the README names."""
    jobs = document(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["check"] == ["bash .ci/run"]
    assert commands["postgres"] == ["make test"]
    assert re.findall(r"^stage make (\S+)", read(".ci/run"), re.MULTILINE) == ["install-dev", "check", "test"]
    versions = jobs["postgres"]["strategy"]["matrix"]["postgres"]
    assert f"({versions[0]} to {versions[-1]})" in read("README.md")


def test_hooks_are_local() -> None:
    """`pre-commit` downloads nothing, and runs the tools of the virtual environment."""
    repositories = document(".pre-commit-config.yaml")["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repositories[0]["hooks"])


def test_every_service_of_the_compose_file_is_fenced_in() -> None:
    """No new privileges, a restart, a healthcheck or the image's, limits; secrets are asked for by name."""
    text = read("docker-compose.yml")
    services = document("docker-compose.yml")["services"]
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "limits" in service["deploy"]["resources"], name
        assert "stop_grace_period" in service, name
        assert "healthcheck" in service or "build" in service, name
        assert "container_name" not in service, f"{name} could not be scaled"
    assert services["lucid"]["read_only"] is services["proxy"]["read_only"] is True
    assert "ports" not in services["lucid"]
    assert "ports" not in services["postgres"]
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == set(re.findall(r"^(\w+)=$", read("deploy/env.example"), re.MULTILINE))
    mounted = services["proxy"]["volumes"][0].split(":")[0]
    assert (ROOT / mounted).is_file()


def test_the_image_is_built_from_the_lock_by_nobody_special() -> None:
    """Hashes are required, nothing is downloaded for the project itself, and no process runs as root."""
    text = read("Dockerfile")
    assert "--require-hashes -r requirements/runtime.txt" in text
    assert "--no-deps --no-build-isolation ." in text
    final = text.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert "/readyz" in final
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()]
    let_in = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    assert copied
    assert all(any(entry == path or entry.startswith(f"{path}/") for entry in let_in) for path in copied)


def test_the_image_of_the_service_can_send_traces() -> None:
    """From a lock of their own, which a checkout gets by one step; the agent's has nothing of it."""
    stages = re.split(r"^FROM ", read("Dockerfile"), flags=re.MULTILINE)[1:]
    by_name = {stage.partition("\n")[0].partition(" AS ")[2]: stage for stage in stages}
    assert "--require-hashes -r requirements/tracing.txt" in by_name["traced"]
    assert "COPY --from=traced" in by_name[""]
    assert "COPY --from=builder" in by_name["agent"]
    assert "requirements/tracing.txt" in read("Makefile")
    assert "make install-tracing" in read("docs/observability.md")


def test_the_image_of_the_agent_runs_the_agent_as_nobody_special() -> None:
    """It is a target of its own; what is built without a target is still the service."""
    stages = re.split(r"^FROM ", read("Dockerfile"), flags=re.MULTILINE)[1:]
    (agent,) = (stage for stage in stages if stage.partition("\n")[0].endswith(" AS agent"))
    assert agent != stages[-1]
    assert re.search(r"^USER (\d+):(\d+)$", agent, re.MULTILINE)
    assert 'ENTRYPOINT ["lucid", "agent", "run"]' in agent
    assert not re.search(r"^(EXPOSE|VOLUME|RUN)", agent, re.MULTILINE)


def test_the_agents_unit_lets_requests_end_and_restarts_only_what_a_restart_mends() -> None:
    """It waits longer than the agent does, and starts no agent anew whose key or node is refused."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string(read("deploy/lucid-agent.service"))
    service = unit["Service"]
    assert service["ExecStart"].endswith("/lucid agent run")
    assert float(service["TimeoutStopSec"]) > drain_seconds()
    assert service["KillMode"] == "mixed"
    statuses = {fault.exit_status for fault in AgentFault.__subclasses__()}
    assert {int(word) for word in service["RestartPreventExitStatus"].split()} == statuses - {2}


def test_the_agents_pod_lets_requests_end_before_its_server_is_stopped() -> None:
    """The agent is an ordinary container, every variable of it is one of its settings, and the server waits for it."""
    documents = {each["kind"]: each for each in yaml.safe_load_all(read("deploy/kubernetes-sidecar.yml"))}
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    agent, server = pod["containers"]
    names = {each["name"] for each in agent["env"] if each["name"].startswith("LUCID_AGENT_")}
    assert names <= {f"LUCID_AGENT_{name.upper()}" for name in AgentSettings.model_fields}
    assert {"LUCID_API_URL", "LUCID_API_KEY", "LUCID_AGENT_NAME", "LUCID_AGENT_PUBLIC_URL"} <= {
        each["name"] for each in agent["env"]
    }
    waits_seconds = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain_seconds() <= waits_seconds < pod["terminationGracePeriodSeconds"]
    assert agent["securityContext"]["allowPrivilegeEscalation"] is False
    selected = documents["Service"]["spec"]["selector"]
    assert selected == documents["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    secret = agent["env"][2]["valueFrom"]["secretKeyRef"]
    assert secret["key"] in documents["Secret"]["stringData"]


def drain_seconds() -> float:
    """Return how long an agent waits for running requests unless it is told otherwise."""
    return float(AgentSettings.model_fields["drain_seconds"].default)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_document_is_yaml_without_a_machines_path(path: str) -> None:
    """It can be read, and says nothing of where it was written."""
    assert document(path)
    assert not re.search(r"(?<![\w.])/(home|root)/", read(path))
