"""A real llama.cpp server goes through the registry: its model becomes available, and unavailable again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.llama import MODEL, START_SECONDS, llama_server, running
from tests.served import Served, eventually, serving
from tests.tiny_gguf import SENTENCE

SCRIPT = Path(__file__).parents[2] / "examples" / "heartbeat_llama_cpp.py"
BEAT_SECONDS = 20.0  # twice the interval that the service dictates


@pytest.fixture
async def lucid() -> AsyncIterator[tuple[Served, httpx.AsyncClient]]:
    """A service as `make run` starts it, and a client with the admin key that it made; the model is registered."""
    with serving() as served:
        async with served.client() as client:
            metadata = {"format": "gguf", "minVramGb": 1, "contextLength": 1024}
            body = {"name": MODEL, "type": "model", "metadata": metadata}
            assert (await client.post("/passports", json=body)).status_code == 201
            yield served, client


@contextmanager
def heartbeats(folder: Path, served: Served, key: str, llama_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the example's script."""
    command = [sys.executable, str(SCRIPT), "--service", served.url, "--llama", llama_url, "--vram", "2GB"]
    with running(folder / "script", [*command, "--name", "this machine"], LUCID_API_KEY=key) as process:
        yield process


async def make_key(client: httpx.AsyncClient) -> str:
    """Answer a new key of the scope that the providers' guide asks for."""
    body = {"name": "node", "owner": "acme", "scopes": ["compute"]}
    return str((await client.post("/keys", json=body)).json()["key"])


async def verdict(client: httpx.AsyncClient) -> tuple[bool, bool, set[str]]:
    """Answer whether the model is available and served, and the reasons why not."""
    explained = (await client.get(f"/models/{MODEL}/availability")).json()
    return explained["available"], explained["served"], set(explained["summary"])


async def becomes(client: httpx.AsyncClient, *wanted: object, within: float = BEAT_SECONDS) -> None:
    """Wait until the verdict on the model is this one; the list has to say the same."""

    async def is_so() -> bool:
        return await verdict(client) == wanted

    await eventually(is_so, within)
    listed = (await client.get("/models?available=true")).json()["models"]
    assert bool(listed) is wanted[0]


async def the_node(client: httpx.AsyncClient) -> dict[str, Any]:
    """Answer the one node that there is."""
    (node,) = (await client.get("/compute")).json()["nodes"]
    shown: dict[str, Any] = node
    return shown


async def test_a_real_servers_model_becomes_available_and_back(
    lucid: tuple[Served, httpx.AsyncClient], tmp_path: Path
) -> None:
    """It is while the script beats: not before, not once the script said goodbye, and not 30 s after it was killed."""
    served, client = lucid
    key = await make_key(client)
    assert await verdict(client) == (False, False, set())
    with llama_server(tmp_path) as llama:
        with heartbeats(tmp_path, served, key, llama.url) as script:
            await becomes(client, True, True, set(), within=START_SECONDS)
            node = await the_node(client)
            assert node["owner"] == "acme"
            assert node["metadata"]["maxContext"] == 1024
            health = node["health"]
            assert (health["status"], health["fresh"], health["load"], health["queueDepth"]) == ("healthy", True, 0, 0)
            assert health["availableModels"] == [MODEL]
            assert health["reported"]["runtime"]["name"] == "llama.cpp"
            assert health["reported"]["tokensGenerated"] == 0
            assert await recite(node["metadata"]["inferenceUrl"]) in f"{SENTENCE} {SENTENCE}".lower()
            script.terminate()
            assert script.wait(BEAT_SECONDS) == 0
        await becomes(client, False, False, {"DRAINING"})
        assert (await the_node(client))["health"]["status"] == "draining"
        with heartbeats(tmp_path, served, key, llama.url) as script:
            await becomes(client, True, True, set(), within=START_SECONDS)
            assert (await the_node(client))["id"] == node["id"]
            script.send_signal(signal.SIGKILL)
            script.wait()
        await served.fall_silent(node["id"], 31)
        await becomes(client, False, False, {"HEARTBEAT_STALE"})


async def test_what_a_server_does_not_tell_is_null_and_its_death_is_reported(
    lucid: tuple[Served, httpx.AsyncClient], tmp_path: Path
) -> None:
    """Without /metrics and /slots nothing is made up; when the server ends, the next heartbeat says so."""
    served, client = lucid
    key = await make_key(client)
    with llama_server(tmp_path, tells=False) as llama, heartbeats(tmp_path, served, key, llama.url) as script:
        await becomes(client, True, True, set(), within=START_SECONDS)
        health = (await the_node(client))["health"]
        assert (health["load"], health["queueDepth"], health["reported"]["tokensGenerated"]) == (None, None, None)
        llama.kill()
        await becomes(client, False, False, {"REPORTED_UNHEALTHY"})
        health = (await the_node(client))["health"]
        assert health["reported"]["detail"] == "llama.cpp does not answer"
        assert (await client.post(f"/compute/deregister/{health['passportId']}")).status_code == 200
        assert script.wait(BEAT_SECONDS) == 1
    assert "was deregistered, for good" in (tmp_path / "script").read_text()


async def recite(inference_url: str) -> str:
    """Ask the real server for a few words, where the passport says that it is."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "go on"}], "max_tokens": 8}
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        answer = await client.post(f"{inference_url}/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"]).strip().lower()
