"""A real agent between a real llama.cpp server and a real registry: one command, and the rest happens."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from demo.tiny_gguf import SENTENCE
from tests.agents import Registry, agent, python_that
from tests.fault_node import Behaviour, FaultNode
from tests.llama import MODEL, START_SECONDS, llama_server


async def test_one_command_serves_a_model_until_it_is_stopped(registry: Registry, tmp_path: Path) -> None:
    """It registers, beats, declares, serves, drains when told to stop, and comes back as the same node."""
    with llama_server(tmp_path) as llama:
        with agent(tmp_path, registry.served.url, registry.key, llama.url, "--region", "eu") as first:
            await registry.becomes(True, True, set(), within=START_SECONDS)
            node = await registry.node()
            metadata, health = node["metadata"], node["health"]
            assert (node["owner"], node["name"], metadata["region"], metadata["vram"]) == (
                "acme",
                "this machine",
                "eu",
                "2GB",
            )
            assert (metadata["maxContext"], metadata["maxConcurrency"]) == (1024, 2)
            assert [runtime["name"] for runtime in metadata["runtimes"]] == ["llama.cpp"]
            assert (health["status"], health["fresh"], health["load"], health["queueDepth"]) == ("healthy", True, 0, 0)
            assert health["availableModels"] == [MODEL]
            assert health["reported"]["gpus"] is None
            declared = (await registry.admin.get(f"/compute/models/{node['id']}")).json()["models"]
            assert [(model["id"], model["maxTokens"], model["quantization"]) for model in declared] == [
                (MODEL, 1024, "f32")
            ]
            assert await registry.complete() in f"{SENTENCE} {SENTENCE}".lower()
            await registry.reports(node["id"], tokensGenerated=8, inFlight=0)
            assert first.stop() == 0, first.log
            assert "drains" in first.log
            assert first.log.splitlines()[-1].endswith("stopped")
        assert await registry.verdict() == (False, False, {"DRAINING"})
        with agent(tmp_path, registry.served.url, registry.key, llama.url) as second:
            await registry.becomes(True, True, set(), within=START_SECONDS)
            again = await registry.node()
            assert again["id"] == node["id"]
            assert again["health"]["reported"]["bootId"] != health["reported"]["bootId"]
            assert second.stop(signal.SIGINT) == 0


async def test_a_killed_server_is_reported_within_two_beats_and_a_new_one_too(
    registry: Registry, tmp_path: Path
) -> None:
    """Killed, the node is unhealthy and says why; what comes back with another model is declared and served as that."""
    other = "other-reciter"
    body = {"name": other, "type": "model", "metadata": {"format": "gguf"}}
    assert (await registry.admin.post("/passports", json=body)).status_code == 201
    async with FaultNode() as front:
        with agent(tmp_path, registry.served.url, registry.key, front.url) as running:
            with llama_server(tmp_path) as llama:
                front._upstream = llama.url
                await registry.becomes(True, True, set(), within=START_SECONDS)
                node = (await registry.node())["id"]
                llama.kill()
                await registry.becomes(False, False, {"REPORTED_UNHEALTHY"})
                health = await registry.health(node)
                reported = health["reported"]
                assert health["availableModels"] == []
                assert (reported["load"], reported["queueDepth"], reported["tokensGenerated"]) == (None, None, None)
                assert reported["detail"].startswith("llama.cpp ")
            with llama_server(tmp_path, model=other) as llama:
                front._upstream = llama.url
                await registry.becomes(True, True, set(), model=other)
                await asyncio.to_thread(running.says_in_time, f"declared {other}")
                assert (await registry.verdict())[1] is False
                await front.stop()
                await registry.becomes(False, False, {"REPORTED_UNHEALTHY"}, model=other)
                assert (await registry.health(node))["reported"]["detail"] == "llama.cpp can't be connected to"
            assert running.log.count("can't be connected to") == 1


async def test_what_a_server_does_not_tell_is_null(registry: Registry, tmp_path: Path) -> None:
    """Without /metrics and /slots nothing is made up, and its slots are known from elsewhere."""
    with (
        llama_server(tmp_path, tells=False) as llama,
        agent(tmp_path, registry.served.url, registry.key, llama.url),
    ):
        await registry.becomes(True, True, set(), within=START_SECONDS)
        node = await registry.node()
        reported = node["health"]["reported"]
        assert (reported["load"], reported["queueDepth"], reported["tokensGenerated"]) == (None, None, None)
        assert node["metadata"]["maxConcurrency"] == 2


async def test_an_operators_drain_is_followed_and_never_lifted(registry: Registry, tmp_path: Path) -> None:
    """The agent says when it is safe to stop; neither its beats nor its restart end the drain."""
    with llama_server(tmp_path) as llama:
        with agent(tmp_path, registry.served.url, registry.key, llama.url) as first:
            await registry.becomes(True, True, set(), within=START_SECONDS)
            node = (await registry.node())["id"]
            assert (await registry.admin.post(f"/compute/drain/{node}")).status_code == 202
            await asyncio.to_thread(first.says_in_time, "it is safe to stop")
            assert first.stop() == 0
        with agent(tmp_path, registry.served.url, registry.key, llama.url) as second:
            await asyncio.to_thread(second.says_in_time, "an operator drains this node")
            health = await registry.health(node)
            assert (health["status"], health["reported"]["status"]) == ("draining", "healthy")
            assert (await registry.admin.post(f"/compute/resume/{node}")).status_code == 200
            await registry.becomes(True, True, set())
            await asyncio.to_thread(second.says_in_time, "the operator's drain is over")


async def test_running_requests_end_before_the_agent_does(registry: Registry, tmp_path: Path) -> None:
    """A stream that runs when SIGTERM comes is delivered whole, and then the node is deregistered, as asked."""
    with llama_server(tmp_path) as llama:
        async with FaultNode(upstream=llama.url) as slow:
            slow.by_path["/v1/chat/completions"] = Behaviour(drip_body_seconds=0.02, drip_bytes=200)
            options = ("--deregister-on-exit", "--drain-seconds", "20")
            with agent(tmp_path, registry.served.url, registry.key, slow.url, *options) as running:
                await registry.becomes(True, True, set(), within=START_SECONDS)
                body = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": "go"}],
                    "max_tokens": 60,
                    "stream": True,
                }
                async with registry.admin.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.aiter_lines()
                    assert (await anext(lines)).startswith("data: ")
                    running.process.terminate()
                    rest = [line async for line in lines]
                assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
                assert await asyncio.to_thread(running.ends) == 0
                assert "deregistered" in running.log
        (node,) = (await registry.admin.get("/passports?type=compute")).json()["passports"]
        assert (await registry.admin.get(f"/compute/health/{node['id']}")).status_code == 410


@pytest.mark.parametrize("hangs", [False, True])
async def test_gpus_are_reported_by_nvml_and_a_driver_that_hangs_holds_up_no_beat(
    registry: Registry, tmp_path: Path, *, hangs: bool
) -> None:
    """What NVML says is the node's memory; what it does not say is null, and the agent ends all the same."""
    prepares = f"""
import pynvml, threading
from tests.fake_nvml import FakeGpu, FakeNvml
fake = FakeNvml([FakeGpu(), FakeGpu()], hangs=threading.Event() if {hangs} else None)
fake.gpus[1].fall_off_the_bus()
pynvml.CDLL = lambda name: fake
"""
    with (
        llama_server(tmp_path) as llama,
        agent(tmp_path, registry.served.url, registry.key, llama.url, command=python_that(prepares)) as running,
    ):
        await registry.becomes(True, True, set(), within=START_SECONDS)
        node = await registry.node()
        gpus = node["health"]["reported"]["gpus"]
        if hangs:
            assert gpus is None
            assert "NVML does not answer" in running.log
        else:
            assert [(gpu["index"], gpu["utilization"], gpu["memoryTotalMb"]) for gpu in gpus] == [
                (0, 0.42, 81559),
                (1, None, None),
            ]
            assert "a GPU fell off the bus" in node["health"]["reported"]["detail"]
        assert await asyncio.to_thread(running.stop) == 0
