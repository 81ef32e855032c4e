"""Whether the server can serve: by its health, by its progress, and by what it is now."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lucid_compute.agent.runtimes import inference_server
from lucid_compute.agent.server_watch import DETECT_AGAIN_SECONDS, ServerWatch
from tests.fault_node import Behaviour, FaultNode
from tests.recorded_servers import NOTHING_THERE, answers_of, recorded_server, saying

SILENT = Behaviour(delay_seconds=math.inf)


class Clock:
    """Stands still until it is moved."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@asynccontextmanager
async def watching(name: str) -> AsyncIterator[tuple[FaultNode, ServerWatch, Clock]]:
    """Watch a recorded server, by a clock that stands still."""
    async with recorded_server(name) as (node, server):
        clock = Clock()
        yield node, ServerWatch(server, clock), clock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no answer for long."""
    monkeypatch.setattr("lucid_compute.agent.server_watch.HEALTH_DEADLINE_SECONDS", 0.1)
    monkeypatch.setattr(inference_server.InferenceServer.get, "__defaults__", (0.1,))


async def test_a_server_that_is_well_has_no_fault() -> None:
    async with watching("vllm-0.32.0") as (_, watch, clock):
        seen = await watch.observe()
        assert (seen.fault, seen.seen_at, seen.reading.running) == (None, clock.seconds, 12)


async def test_a_server_that_nobody_listens_for_is_dead_at_once() -> None:
    async with watching("vllm-0.32.0") as (node, watch, _):
        await watch.observe()
        await node.stop()
        assert (await watch.observe()).fault == "vllm can't be connected to"
        await node.start()
        assert (await watch.observe()).fault is None


async def test_a_dead_engine_behind_a_living_front_is_a_fault() -> None:
    """A vLLM goes on answering /version then, and 503 to /health."""
    async with watching("vllm-0.32.0") as (node, watch, _):
        await watch.observe()
        node.by_path["/health"] = saying(b"", status=503)
        assert (await watch.observe()).fault == "vllm answers 503 to its health check"


@pytest.mark.usefixtures("impatient")
async def test_one_silence_is_forgiven_and_two_are_not() -> None:
    async with watching("vllm-0.32.0") as (node, watch, _):
        await watch.observe()
        node.by_path["/health"] = SILENT
        assert (await watch.observe()).fault is None
        assert (await watch.observe()).fault == "vllm does not answer within 0.1 s"
        node.by_path["/health"] = saying(b"")
        assert (await watch.observe()).fault is None


@pytest.mark.usefixtures("impatient")
async def test_slow_metrics_are_unknown_and_no_fault() -> None:
    async with watching("vllm-0.32.0") as (node, watch, _):
        await watch.observe()
        node.by_path["/metrics"] = SILENT
        seen = await watch.observe()
        assert (seen.fault, seen.reading.running) == (None, None)
        assert seen.reading.models


@pytest.mark.parametrize("name", ["vllm-0.32.0", "sglang", "tgi", "llama.cpp"])
async def test_a_wedged_server_is_a_fault_after_a_minute_though_its_health_is_well(name: str) -> None:
    async with watching(name) as (node, watch, clock):
        for seconds, is_wedged in ((0, False), (59, False), (2, True), (60, True)):
            clock.seconds += seconds
            fault = (await watch.observe()).fault
            assert (fault is not None and "is wedged" in fault) is is_wedged
        node.by_path["/metrics"] = saying(_idle(answers_of(name)["/metrics"]))
        node.by_path["/slots"] = NOTHING_THERE
        assert (await watch.observe()).fault is None


async def test_another_server_behind_the_same_address_is_recognised_when_it_comes() -> None:
    async with watching("llama.cpp") as (node, watch, _):
        await watch.observe()
        await node.stop()
        await watch.observe()
        node.by_path = answers_of("tgi")
        await node.start()
        seen = await watch.observe()
        assert seen.detection is not None
        assert (seen.detection.runtime.name, seen.fault) == ("tgi", None)
        assert [model.id for model in seen.reading.models or ()] == ["meta-llama/Llama-3.1-8B-Instruct"]


async def test_another_server_without_the_same_health_check_is_recognised_too() -> None:
    async with watching("llama.cpp") as (node, watch, _):
        await watch.observe()
        node.by_path = answers_of("ollama")
        del node.by_path["/health"]
        assert (await watch.observe()).fault is not None
        seen = await watch.observe()
        assert seen.detection is not None
        assert (seen.detection.runtime.name, seen.fault) == ("ollama", None)


async def test_a_worse_look_does_not_make_a_server_unknown() -> None:
    async with watching("vllm-0.32.0") as (node, watch, clock):
        await watch.observe()
        clock.seconds += DETECT_AGAIN_SECONDS
        for path in ("/metrics", "/version"):
            node.by_path[path] = NOTHING_THERE
        node.by_path["/v1/models"] = saying(b'{"data":[{"id":"m","owned_by":"proxy"}]}')
        seen = await watch.observe()
        assert seen.detection is not None
        assert seen.detection.runtime.name == "vllm"


async def test_a_server_that_wants_a_key_says_which_option_is_missing() -> None:
    async with watching("vllm-0.32.0") as (node, watch, _):
        node.by_path = {}
        node.behaviour = saying(b"{}", status=401)
        assert "--inference-key" in ((await watch.observe()).fault or "")


async def test_a_server_that_is_not_up_yet_is_found_when_it_is() -> None:
    async with watching("vllm-0.32.0") as (node, watch, _):
        await node.stop()
        seen = await watch.observe()
        assert (seen.detection, seen.fault) == (None, "the inference server can't be connected to")
        await node.start()
        assert (await watch.observe()).fault is None


def _idle(metrics: Behaviour) -> bytes:
    """The same metrics, and a little has moved since."""
    assert metrics.answer is not None
    body = metrics.answer.body
    assert isinstance(body, bytes)
    return b"".join(line if line.startswith(b"#") else _moved(line) for line in body.splitlines(keepends=True))


def _moved(line: bytes) -> bytes:
    name = line.partition(b"{")[0].partition(b" ")[0]
    return line.rpartition(b" ")[0] + b" 987654\n" if name.endswith((b"_total", b"_success")) else line
