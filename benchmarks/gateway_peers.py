"""Other routers that the gateway benchmark compares with, over the same backend; none of them asks for a key.

Each lives in a virtual environment of its own, made from its lock when it is first needed; nginx is the distribution's.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.gateway_backend import MODEL
from benchmarks.gateway_targets import NO_KEY, Skipped, Target, first_refusal
from benchmarks.servers import SERVER_CORE, Server, on_core, wait_until

VLLM_ROUTER = "vllm-router"
ROOT = Path(__file__).parents[1]
INSTALL_TIMEOUT_SECONDS = 600.0
ROUTER_TIMEOUT_SECONDS = 90.0  # LiteLLM imports for half a minute
_LITELLM_MODEL = """
  - model_name: "{model}"
    litellm_params: {{model: "openai/{model}", api_base: "http://127.0.0.1:{port}/v1", api_key: "none"}}"""
_NGINX = """
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  upstream nodes {{ {servers} keepalive 256; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


Start = Callable[[Sequence[int]], AbstractContextManager[Target]]
"""Starts a router in front of the nodes with these ports."""


class Place(NamedTuple):
    """Where a router runs: the ports of its nodes, its own port, another one for its metrics, and a folder."""

    nodes: Sequence[int]
    port: int
    metrics_port: int
    folder: Path


def peers() -> dict[str, Start]:
    """Return the routers by their names; each is started with the ports of its nodes.

    Raises, when it is started:
        Skipped: it can't be installed, or it does not route.
    """
    return {
        VLLM_ROUTER: partial(_run, "bench", _command_of_vllm_router),
        "smg": partial(_run, "bench-smg", _command_of_smg),
        "litellm": partial(_run, "bench-litellm", _command_of_litellm),
        "nginx": partial(_run, None, _command_of_nginx),
    }


def _command_of_vllm_router(place: Place) -> list[str]:
    """Its own defaults, except the policy and the log, which omits single requests."""
    command = ["vllm-router", "--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin"]
    command += ["--prometheus-port", str(place.metrics_port), "--log-level", "warning", "--worker-urls"]
    return command + [f"http://127.0.0.1:{node}" for node in place.nodes]


def _command_of_smg(place: Place) -> list[str]:
    command = ["smg", "launch", "--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin"]
    command += ["--prometheus-port", str(place.metrics_port), "--log-level", "warn", "--disable-tokenizer-autoload"]
    return [*command, "--worker-urls", *(f"http://127.0.0.1:{node}" for node in place.nodes)]


def _command_of_litellm(place: Place) -> list[str]:
    models = "".join(_LITELLM_MODEL.format(model=MODEL, port=node) for node in place.nodes)
    settings = place.folder / "litellm.yaml"
    settings.write_text(f"model_list:{models}\nlitellm_settings: {{num_retries: 0, telemetry: false}}\n")
    return [
        "litellm",
        "--config",
        str(settings),
        "--host",
        "127.0.0.1",
        "--port",
        str(place.port),
        "--num_workers",
        "1",
    ]


def _command_of_nginx(place: Place) -> list[str]:
    """A proxy that knows nothing of models, as the floor."""
    settings = place.folder / "nginx.conf"
    servers = " ".join(f"server 127.0.0.1:{node};" for node in place.nodes)
    settings.write_text(_NGINX.format(folder=place.folder, servers=servers, port=place.port))
    return ["nginx", "-p", str(place.folder), "-c", str(settings)]


@contextmanager
def _run(lock: str | None, command_of: Callable[[Place], list[str]], nodes: Sequence[int]) -> Iterator[Target]:
    """Install a router, and run it until the block ends."""
    programs = None if lock is None else _install(lock)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        place = Place(nodes, _free_port(), _free_port(), Path(folder))
        program, *arguments = command_of(place)
        path = shutil.which(program, path=programs)
        if path is None:
            raise Skipped(f"there is no {program} here" + ("" if lock else ": the distribution's package has it"))
        with on_core(SERVER_CORE):
            process = subprocess.Popen([path, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait_for_peer(process, place.port)
            if said := first_refusal(place.port, NO_KEY):
                output.seek(0)
                raise Skipped(f"{said}; {_last_line(output.read())}")
            yield Target([place.port], processes=[Server(place.port, pid) for pid in _family_of(process.pid)])
        finally:
            process.terminate()
            process.wait(60)


def _family_of(pid: int) -> list[int]:
    """Return a process and its children, those that answer first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*map(int, children), pid]


def _install(name: str) -> str:
    """Make a router's virtual environment, unless it holds what the lock says; return the folder of its programs."""
    venv, lock = ROOT / f".venv-{name}", ROOT / "requirements" / f"{name}.txt"
    install = [sys.executable, str(ROOT / "scripts" / "install.py"), str(venv), str(lock), str(venv / ".installed")]
    try:
        subprocess.run(install, check=True, stderr=subprocess.PIPE, text=True, timeout=INSTALL_TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        raise Skipped(f"it can't be installed from {lock.name}: {_last_line(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"it can't be installed within {INSTALL_TIMEOUT_SECONDS:.0f} s") from error
    return str(venv / "bin")


def _wait_for_peer(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the router listens, has ended, or the time is over."""
    with suppress(TimeoutError):
        wait_until(lambda: process.poll() is not None or _listens(port), ROUTER_TIMEOUT_SECONDS)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]
