"""Recorded answers of inference servers, given by a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lucid_compute.agent.runtimes.inference_server import InferenceServer
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode

FIXTURES = Path(__file__).parent / "fixtures" / "runtimes"
ALL = tuple(sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
NOTHING_THERE = Behaviour(answer=respond(b'{"detail":"Not Found"}', status=404))
_PLAIN = "text/plain; version=0.0.4"


def folder_of(name: str) -> Path:
    """Return the one folder whose name begins so."""
    (found,) = (FIXTURES / each for each in ALL if each.startswith(name))
    return found


def answers_of(name: str) -> dict[str, Behaviour]:
    """Return what the server of a folder answers, by path; all are well."""
    files = {file.stem: file for file in folder_of(name).iterdir()}
    nested = {"v1_models": "/v1/models", "api_tags": "/api/tags", "api_ps": "/api/ps", "api_version": "/api/version"}
    answers = {
        nested.get(stem, f"/{stem}"): saying(file.read_bytes(), _PLAIN if file.suffix == ".txt" else "application/json")
        for stem, file in files.items()
    }
    return {"/health": saying(b""), **answers}


def saying(body: bytes, content_type: str = "application/json", status: int = 200) -> Behaviour:
    """Return this, once it is asked."""
    return Behaviour(answer=respond(body, status=status, content_type=content_type))


@asynccontextmanager
async def recorded_server(name: str, **changes: Behaviour) -> AsyncIterator[tuple[FaultNode, InferenceServer]]:
    """Serve the answers of a folder, and ask them; `changes` are by path, with `_` for `/`."""
    async with FaultNode(NOTHING_THERE) as node:
        node.by_path |= answers_of(name) | {f"/{path.replace('__', '/')}": answer for path, answer in changes.items()}
        server = InferenceServer(f"{node.url}/v1")
        try:
            yield node, server
        finally:
            await server.close()
