"""A node behind NAT: only its agent opens connections, and nothing else changes for anybody."""

from __future__ import annotations

from pathlib import Path

from tests.agents import Registry, agent
from tests.llama import START_SECONDS, llama_server


async def test_one_command_serves_a_model_without_an_open_port(registry: Registry, tmp_path: Path) -> None:
    """The registry is told no address. Requests, probes and streams reach the server down the agent's connection."""
    with llama_server(tmp_path) as llama:
        with agent(tmp_path, registry.served.url, registry.key, llama.url, "--outbound") as running:
            await registry.becomes(True, True, set(), within=START_SECONDS)
            node = await registry.node()
            assert node["metadata"]["connectivity"] == "outbound"
            assert "inferenceUrl" not in node["metadata"]
            assert await registry.complete()
            probe = (await registry.admin.post(f"/compute/probe/{node['id']}")).json()
            assert (probe["reachable"], probe["code"]) == (True, "ok")
            assert running.stop() == 0, running.log
        assert await registry.verdict() == (False, False, {"DRAINING", "NOT_CONNECTED"})
