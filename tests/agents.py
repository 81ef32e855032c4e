"""A real `lucid agent run` below a test, and the real registry that it reports to, as a provider sees both."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests import ROOT
from tests.llama import MODEL, running, said
from tests.lucid_serve import LUCID, Served, eventually, wait_until

NOBODY_LISTENS = "http://127.0.0.1:65009"
BEATS_SECONDS = 25.0  # two beats, and what a busy machine adds

STOP_SECONDS = 30.0


class AgentProcess:
    """One agent that runs."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        """Hold a process whose words go to `output`."""
        self.process = process
        self._output = output

    @property
    def log(self) -> str:
        """What it has said."""
        return self._output.read_text(errors="replace")

    def says(self, pattern: str) -> str:
        """Wait until it says something that matches; return the group of the match."""
        return said(self._output, self.process, pattern)

    def says_in_time(self, words: str, seconds: float = 30.0) -> None:
        """Wait until it says these words."""
        wait_until(lambda: words in self.log, seconds)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.ends()

    def ends(self) -> int:
        """Wait until it ends; return its exit status."""
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def agent(
    folder: Path, api: str, key: str, url: str, *options: str, command: Sequence[str | Path] = (LUCID,)
) -> Iterator[AgentProcess]:
    """Run an agent for the server at `url`, with 2 GB for models and under the name `this machine`."""
    output = folder / f"agent-{sum(1 for _ in folder.glob('agent-*'))}"
    told = ["--url", url, "--api", api, "--vram", "2GB", "--name", "this machine", *options]
    with running(
        output, [*map(str, command), "agent", "run", *told], LUCID_API_KEY=key, PYTHONPATH=str(ROOT)
    ) as process:
        yield AgentProcess(process, output)


def python_that(prepares: str) -> Sequence[str]:
    """Return a command that is `lucid` after some Python was run in its process."""
    return (sys.executable, "-c", f"{prepares}\nfrom lucid_compute.cli.main import main\nmain()")


class Registry:
    """A service as `make run` starts it, its admin's client, and a provider's key."""

    def __init__(self, served: Served, admin: httpx.AsyncClient, key: str) -> None:
        self.served, self.admin, self.key = served, admin, key

    async def verdict(self, model: str = MODEL) -> tuple[bool, bool, set[str]]:
        """Return whether the model is available and served, and the reasons why not."""
        explained = (await self.admin.get(f"/models/{model}/availability")).json()
        return explained["available"], explained["served"], set(explained["summary"])

    async def becomes(self, *wanted: object, within: float = BEATS_SECONDS, model: str = MODEL) -> None:
        """Wait until the verdict on the model is this one; the list says the same."""

        async def is_so() -> bool:
            return await self.verdict(model) == wanted

        await eventually(is_so, within)
        listed = (await self.admin.get("/models?available=true")).json()["models"]
        assert (model in {each["name"] for each in listed}) is wanted[0]

    async def node(self) -> dict[str, Any]:
        """Return the one node that lives."""
        (node,) = (await self.admin.get("/compute")).json()["nodes"]
        shown: dict[str, Any] = node
        return shown

    async def health(self, node: str) -> dict[str, Any]:
        """Return a node's health."""
        shown: dict[str, Any] = (await self.admin.get(f"/compute/health/{node}")).json()
        return shown

    async def reports(self, node: str, **wanted: object) -> None:
        """Wait until the node reports these values."""

        async def does() -> bool:
            reported = (await self.health(node))["reported"] or {}
            return all(reported[name] == value for name, value in wanted.items())

        await eventually(does, BEATS_SECONDS)

    async def complete(self) -> str:
        """Ask the gateway for a completion, as a client does."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "go on"}], "max_tokens": 8}
        answer = await self.admin.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"]).strip().lower()


@asynccontextmanager
async def open_registry(served: Served) -> AsyncIterator[Registry]:
    """Return a registry that is ready and knows the model, with a key."""
    async with served.client(timeout_seconds=30) as admin:
        metadata = {"format": "gguf", "minVramGb": 1, "contextLength": 1024}
        body = {"name": MODEL, "type": "model", "metadata": metadata}
        assert (await admin.post("/passports", json=body)).status_code == 201
        yield Registry(served, admin, await make_key(admin))


async def make_key(admin: httpx.AsyncClient) -> str:
    """Return a new key of a provider."""
    body = {"name": "node", "owner": "acme", "scopes": ["compute"]}
    return str((await admin.post("/keys", json=body)).json()["key"])
