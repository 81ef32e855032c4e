"""A real agent between a real llama.cpp server and a real registry: one command, and the rest happens."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agents import agent, python_that
from tests.fault_answers import respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.llama import MODEL, START_SECONDS, llama_server
from tests.recorded import recorded
from tests.served import Served, eventually, folder, serving, serving_on_a_clone
from tests.tiny_gguf import SENTENCE

NOBODY_LISTENS = "http://127.0.0.1:65009"
BEATS_SECONDS = 25.0  # two beats, and what a busy machine adds


class Registry:
    """A service as `make run` starts it, its admin's client, and a provider's key."""

    def __init__(self, served: Served, admin: httpx.AsyncClient, key: str) -> None:
        """Speak to `served`."""
        self.served, self.admin, self.key = served, admin, key

    async def verdict(self, model: str = MODEL) -> tuple[bool, bool, set[str]]:
        """Answer whether the model is available and served, and the reasons why not."""
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
        """Answer the one node that lives."""
        (node,) = (await self.admin.get("/compute")).json()["nodes"]
        shown: dict[str, Any] = node
        return shown

    async def health(self, node: str) -> dict[str, Any]:
        """Answer a node's health."""
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
    """Answer a registry that is ready and knows the model, with a key."""
    async with served.client(timeout_seconds=30) as admin:
        metadata = {"format": "gguf", "minVramGb": 1, "contextLength": 1024}
        body = {"name": MODEL, "type": "model", "metadata": metadata}
        assert (await admin.post("/passports", json=body)).status_code == 201
        yield Registry(served, admin, await make_key(admin))


async def make_key(admin: httpx.AsyncClient) -> str:
    """Answer a new key of a provider."""
    body = {"name": "node", "owner": "acme", "scopes": ["compute"]}
    return str((await admin.post("/keys", json=body)).json()["key"])


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    """A service as `make run` starts it."""
    with serving() as served:
        async with open_registry(served) as opened:
            yield opened


@pytest.fixture(scope="module")
def small_registry(postgres_and_template: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """A service that several tests share, and a key."""
    with serving_on_a_clone(postgres_and_template) as served:

        async def key() -> str:
            async with served.client() as admin:
                return await make_key(admin)

        yield served.url, asyncio.run(key())


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


async def test_an_agent_outlives_the_registry_until_its_node_is_deregistered(tmp_path: Path) -> None:
    """A kill -9 of the service costs nothing but time; a deregistration by somebody else is a wish, and ends it."""
    with folder() as made, llama_server(tmp_path) as llama, Served(made) as served:
        port = served.url.rsplit(":", 1)[1]
        served.stop()
        again = Served(made, PORT=port)
        with again:
            async with open_registry(again) as registry:
                with agent(tmp_path, registry.served.url, registry.key, llama.url) as running:
                    await asyncio.to_thread(running.says_in_time, "declared")
                    node = (await registry.node())["id"]
                    registry.served.kill()
                    await asyncio.to_thread(running.says_in_time, "trying again")
                    registry.served.start()
                    await asyncio.to_thread(registry.served.wait_until_ready)
                    await asyncio.to_thread(running.says_in_time, "takes this node's heartbeats again", 60.0)
                    assert (await registry.node())["id"] == node
                    assert (await registry.admin.post(f"/compute/deregister/{node}")).status_code == 200
                    assert await asyncio.to_thread(running.ends) == 10
                    assert "deregistered, for good" in running.log
                    assert "Traceback" not in running.log


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


@pytest.mark.parametrize(
    ("options", "key", "ends"),
    [
        ((), "lk_live_wrong", (4, "UNAUTHORIZED")),
        (("--public-url", "http://10.0.0.1:8000"), None, (2, "INVALID_REQUEST")),
        (("--passport-id", "1b4e28ba-2fa1-11d2-883f-0016d3cca427"), None, (5, "PASSPORT_NOT_FOUND")),
        (("--vram", "much"), None, (2, "--vram: Send the memory")),
        (("--api", "http://lucid.example"), None, (2, "--public-url")),
    ],
)
def test_what_waiting_does_not_mend_ends_the_agent_at_its_start(
    small_registry: tuple[str, str], tmp_path: Path, options: tuple[str, ...], key: str | None, ends: tuple[int, str]
) -> None:
    """One sentence, and a status that says what kind of thing is wrong."""
    url, good_key = small_registry
    status, words = ends
    with agent(tmp_path, url, key or good_key, NOBODY_LISTENS, *options) as running:
        assert running.ends() == status, running.log
    assert words in running.log
    assert "Traceback" not in running.log


def test_a_second_agent_of_the_same_name_takes_the_node_over(small_registry: tuple[str, str], tmp_path: Path) -> None:
    """The first is told so by the registry, says what to do and ends, rather than beat in vain."""
    url, key = small_registry
    with agent(tmp_path, url, key, NOBODY_LISTENS) as first:
        first.says(r"(registered)")
        with agent(tmp_path, url, key, NOBODY_LISTENS) as second:
            assert first.ends() == 11, first.log
            assert "give each its own --name" in first.log
            assert second.process.poll() is None


async def test_requests_that_do_not_end_are_waited_for_until_the_deadline_or_a_second_signal(
    small_registry: tuple[str, str], tmp_path: Path
) -> None:
    """Two requests run for ever: the time to drain is kept, and nobody who means it has to wait for it."""
    url, key = small_registry
    async with recorded("llama.cpp") as (node, _):
        with agent(tmp_path, url, key, node.url, "--drain-seconds", "2") as patient:
            await asyncio.to_thread(patient.says_in_time, "declared")
            assert await asyncio.to_thread(patient.stop) == 0
            assert "the time to drain is over; 2 requests may still run" in patient.log
        with agent(tmp_path, url, key, node.url) as hurried:
            await asyncio.to_thread(hurried.says_in_time, "found this machine")
            hurried.process.terminate()
            await asyncio.to_thread(hurried.says_in_time, "the node drains, for 60 s")
            assert await asyncio.to_thread(hurried.stop) == 128 + signal.SIGTERM
            assert "Traceback" not in hurried.log


async def test_one_lost_beat_is_sent_again_and_lost_news_cost_nothing(tmp_path: Path) -> None:
    """The answer of a heartbeat is lost: a second later it is sent again under its number, and counts once."""
    with serving() as served:
        async with served.client() as admin, FaultNode(upstream=served.url) as between:
            key = await make_key(admin)
            cut = Behaviour(cut_head_after=10, ending=Ending.RESET)
            between.by_path["/compute/heartbeat"] = cut
            with agent(tmp_path, between.url, key, NOBODY_LISTENS) as running:
                await asyncio.to_thread(running.says_in_time, "trying again")
                del between.by_path["/compute/heartbeat"]
                await asyncio.to_thread(running.says_in_time, "takes this node's heartbeats again")
                beats = [json.loads(each.body) for each in between.requests if each.path == "/compute/heartbeat"]
                assert [beat["sequence"] for beat in beats[:2]] == [1, 1]
                assert beats[0] == beats[1]
                (node,) = (await admin.get("/compute")).json()["nodes"]
                assert node["health"]["reported"]["sequence"] == beats[-1]["sequence"]
                assert running.log.count("trying again") == 1


async def test_a_registry_that_forgot_the_node_gets_it_again(tmp_path: Path) -> None:
    """As after a restore from an old backup: the beat is answered 404, and the agent registers anew."""
    with serving() as served:
        async with served.client() as admin, FaultNode(upstream=served.url) as between:
            key = await make_key(admin)
            error = {"code": "NODE_NOT_FOUND", "message": "No node.", "status": 404, "details": {}}
            missing = Behaviour(answer=respond(json.dumps({"error": error}).encode(), status=404))
            between.by_path["/compute/heartbeat"] = missing
            with agent(tmp_path, between.url, key, NOBODY_LISTENS) as running:
                await asyncio.to_thread(running.says_in_time, "registering anew")
                del between.by_path["/compute/heartbeat"]
                await asyncio.to_thread(running.says_in_time, "found this machine")

                async def beats() -> bool:
                    (node,) = (await admin.get("/compute")).json()["nodes"]
                    return node["health"]["reported"] is not None

                await eventually(beats, BEATS_SECONDS)


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
