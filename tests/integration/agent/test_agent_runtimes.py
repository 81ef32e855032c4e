"""Each runtime is recognised by its own answers and read by its own names, as tests/fixtures/runtimes has them."""

from __future__ import annotations

import json

import pytest

from lucid_compute.agent.runtimes.detection import CERTAIN, GUESSED, LIKELY, Detection, detect
from lucid_compute.agent.runtimes.reading import ServedModel, ServerReading
from tests.fault_answers import endless_body, redirect, respond
from tests.fault_node import Behaviour, Ending
from tests.recorded_servers import NOTHING_THERE, answers_of, recorded_server, saying

LLAMA = ServedModel(id="tiny-reciter", max_tokens=1024, quantization="f32")


async def look(name: str, **changes: Behaviour) -> tuple[Detection, ServerReading]:
    """Return what a recorded server is found to be, and what is read of it."""
    async with recorded_server(name, **changes) as (_, server):
        detection = await detect(server)
        assert detection is not None
        return detection, await detection.runtime.read(server)


@pytest.mark.parametrize(
    ("name", "runtime", "version"),
    [
        ("llama.cpp", "llama.cpp", "b0-unknown"),
        ("ollama", "ollama", "0.12.6"),
        ("sglang", "sglang", "0.5.10"),
        ("tgi", "tgi", "3.3.6"),
        ("vllm-0.32.0", "vllm", "0.32.0"),
        ("vllm-0.6.3", "vllm", "0.6.3"),
    ],
)
async def test_a_runtime_is_recognised_for_certain_and_says_why(name: str, runtime: str, version: str) -> None:
    detection, _ = await look(name)
    assert (detection.runtime.name, detection.runtime.version) == (runtime, version)
    assert detection.confidence == CERTAIN
    assert len(detection.evidence) > 1


async def test_vllm_is_read_as_it_is_recorded_under_load() -> None:
    _, reading = await look("vllm-0.32.0")
    assert reading.models == (ServedModel(id="tiny-llama", max_tokens=512),)
    assert (reading.running, reading.queued, reading.tokens_generated) == (12, 0, 2899)
    assert reading.kv_use == pytest.approx(0.00586, abs=1e-5)
    assert (reading.jobs_completed, reading.max_concurrency, reading.not_ready) == (3, None, None)


async def test_older_vllm_calls_its_cache_otherwise() -> None:
    _, reading = await look("vllm-0.6.3")
    assert (reading.running, reading.queued, reading.kv_use) == (3, 7, 0.8125)
    assert (reading.tokens_generated, reading.jobs_completed) == (90210, 322)


async def test_vllm_of_several_engines_is_the_sum_and_its_fullest_cache() -> None:
    text = "".join(
        f'vllm:num_requests_running{{engine="{engine}",model_name="m"}} {running}\n'
        f'vllm:num_requests_waiting{{engine="{engine}",model_name="m"}} {waiting}\n'
        f'vllm:num_requests_waiting_by_reason{{engine="{engine}",model_name="m",reason="capacity"}} {waiting}\n'
        f'vllm:kv_cache_usage_perc{{engine="{engine}",model_name="m"}} {use}\n'
        for engine, running, waiting, use in ((0, 3, 1, 0.4), (1, 2, 4, 0.9))
    )
    _, reading = await look("vllm-0.32.0", metrics=saying(text.encode()))
    assert (reading.running, reading.queued, reading.kv_use) == (5, 5, 0.9)
    assert reading.tokens_generated is None


async def test_vllm_that_sleeps_can_not_serve() -> None:
    text = b'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0\n'
    _, reading = await look("vllm-0.32.0", metrics=saying(text))
    assert reading.not_ready == "vLLM sleeps; POST /wake_up wakes it"


async def test_sglangs_ranks_and_priorities_are_not_counted_twice() -> None:
    detection, reading = await look("sglang")
    assert (reading.running, reading.queued, reading.kv_use) == (24, 3, 0.73)
    assert (reading.tokens_generated, reading.max_concurrency) == (7557572, 128)
    assert reading.models == (ServedModel(id="Qwen/Qwen3-8B", max_tokens=40960, quantization="fp8"),)
    assert detection.runtime.name == "sglang"  # although it answers Ollama's /api/tags


async def test_sglang_with_a_key_and_without_metrics_is_recognised_and_unknown() -> None:
    locked = saying(b"{}", status=401)
    detection, reading = await look("sglang", server_info=locked, get_server_info=locked, metrics=NOTHING_THERE)
    assert (detection.runtime.name, detection.confidence) == ("sglang", LIKELY)
    assert "/server_info wants a key: give the agent the server's key" in detection.evidence
    assert (reading.running, reading.queued, reading.kv_use, reading.progress) == (None, None, None, None)


async def test_older_sglang_calls_its_info_otherwise() -> None:
    info = answers_of("sglang")["/server_info"]
    detection, _ = await look("sglang", server_info=NOTHING_THERE, get_server_info=info)
    assert detection.runtime.version == "0.5.10"


async def test_tgi_has_no_share_of_its_cache() -> None:
    _, reading = await look("tgi")
    assert reading.models == (ServedModel(id="meta-llama/Llama-3.1-8B-Instruct", max_tokens=4096),)
    assert (reading.running, reading.queued, reading.kv_use, reading.max_concurrency) == (5, 2, None, 128)
    assert (reading.tokens_generated, reading.jobs_completed) == (3423, 109)


async def test_llama_cpp_is_read_by_its_slots() -> None:
    _, reading = await look("llama.cpp")
    assert reading.models == (LLAMA,)
    assert (reading.running, reading.queued, reading.max_concurrency, reading.kv_use) == (2, 2, 2, None)
    assert reading.tokens_generated == 20


async def test_llama_cpp_works_on_while_its_count_of_tokens_stands_still() -> None:
    """The counter moves when a request ends; what moves meanwhile are the decoding steps, or the slots'."""
    before = answers_of("llama.cpp")
    _, first = await look("llama.cpp")
    body = before["/metrics"].answer
    assert body is not None
    moved = saying(body.body.replace(b"n_decode_total 464", b"n_decode_total 465"))  # type: ignore[union-attr]
    _, second = await look("llama.cpp", metrics=moved)
    assert second.tokens_generated == first.tokens_generated
    assert second.progress != first.progress
    _, without = await look("llama.cpp", metrics=NOTHING_THERE)
    assert without.tokens_generated is None
    assert without.progress is not None


async def test_llama_cpp_that_sleeps_is_not_woken() -> None:
    async with recorded_server("llama.cpp", props=saying(b'{"is_sleeping": true, "total_slots": 4}')) as (node, server):
        detection = await detect(server)
        assert detection is not None
        node.requests.clear()
        reading = await detection.runtime.read(server)
        assert {request.path for request in node.requests} == {"/v1/models", "/props"}
    assert (reading.running, reading.max_concurrency) == (None, 4)


async def test_a_router_of_llama_cpp_declares_all_and_reports_what_is_loaded() -> None:
    listed = [{"id": "a", "status": {"value": "loaded"}}, {"id": "b/c", "status": {"value": "unloaded"}}]
    models = saying(
        json.dumps({"object": "list", "data": [{**each, "owned_by": "llamacpp"} for each in listed]}).encode()
    )
    metrics = {"metrics?model=a": saying(b"llamacpp:requests_processing 3\n")}
    _, reading = await look("llama.cpp", v1__models=models, props=saying(b'{"role":"router"}'), **metrics)
    assert [(model.id, model.is_loaded) for model in reading.models or ()] == [("a", True), ("b/c", False)]
    assert (reading.running, reading.queued) == (3, None)


async def test_ollama_declares_what_is_installed_here_and_never_what_runs_in_the_cloud() -> None:
    _, reading = await look("ollama")
    assert reading.models == (
        ServedModel(id="mistral:latest", max_tokens=4096, quantization="q4_0"),
        ServedModel(id="qwen2.5:7b", quantization="q4_k_m", is_loaded=False),
    )
    assert (reading.running, reading.queued, reading.progress) == (None, None, None)
    assert reading.notes == ("mistral:latest runs on the CPU in part: 59 % of it are in the GPU's memory",)


async def test_an_ollama_model_that_is_unloaded_keeps_its_declaration() -> None:
    async with recorded_server("ollama") as (node, server):
        detection = await detect(server)
        assert detection is not None
        before = await detection.runtime.read(server)
        node.by_path["/api/ps"] = saying(b'{"models": []}')
        after = await detection.runtime.read(server)
    assert [model.max_tokens for model in after.models or ()] == [model.max_tokens for model in before.models or ()]
    assert not any(model.is_loaded for model in after.models or ())


async def test_what_only_lists_models_is_openai_compatible_and_names_no_runtime() -> None:
    models = saying(b'{"object":"list","data":[{"id":"m","owned_by":"me"},{"id":"m"},{"id":""},{"id":7},"x"]}')
    detection, reading = await look("tgi", info=NOTHING_THERE, metrics=NOTHING_THERE, v1__models=models)
    assert (detection.runtime.name, detection.shown_name) == (None, "openai-compatible")
    assert detection.confidence == GUESSED
    assert reading.models == (ServedModel(id="m"),)


async def test_a_version_alone_is_no_vllm_and_a_list_of_tags_no_ollama() -> None:
    detection, _ = await look(
        "sglang",
        version=saying(b'{"version":"9"}'),
        metrics=NOTHING_THERE,
        server_info=NOTHING_THERE,
        v1__models=saying(b'{"data":[{"id":"m","owned_by":"x"}]}'),
    )
    assert detection.shown_name == "openai-compatible"


@pytest.mark.parametrize(
    "behaviour",
    [
        NOTHING_THERE,
        Behaviour(ending=Ending.RESET, cut_head_after=0),
        Behaviour(answer=endless_body()),
        Behaviour(answer=redirect("http://127.0.0.1:9/")),
        Behaviour(answer=respond(b"[" * 100_000)),
        Behaviour(answer=respond(b'{"data": {"a": 1}, "models": "x", "version": ["v"], "model_id": {}}')),
        Behaviour(answer=respond(b"\x00\xff garbage")),
    ],
    ids=["404", "reset", "endless", "redirect", "deep", "wrong types", "garbage"],
)
async def test_no_answer_makes_a_server_of_what_is_none(behaviour: Behaviour) -> None:
    async with recorded_server("vllm-0.6.3") as (node, server):
        node.by_path.clear()
        node.behaviour = behaviour
        assert await detect(server) is None


async def test_an_answer_has_a_bound_and_a_deadline_for_all_of_it() -> None:
    async with recorded_server("vllm-0.6.3") as (node, server):
        node.by_path["/metrics"] = Behaviour(answer=endless_body(piece=b" " * 1_000_000))
        assert (await server.get("/metrics", 30)).fault == "answers more than 8388608 bytes to /metrics"
        node.by_path["/metrics"] = Behaviour(answer=respond(b"x" * 1000), drip_body_seconds=0.01)
        assert (await server.get("/metrics", 0.1)).fault == "does not answer within 0.1 s"


@pytest.mark.parametrize("name", ["llama.cpp", "ollama", "sglang", "tgi", "vllm-0.32.0"])
@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'{"data": [null], "models": [null, {"name": 5}], "internal_states": 5}', b"\xff" * 99],
)
async def test_a_server_that_begins_to_answer_nonsense_is_unknown(name: str, body: bytes) -> None:
    async with recorded_server(name) as (node, server):
        detection = await detect(server)
        assert detection is not None
        node.by_path.clear()
        node.behaviour = saying(body)
        reading = await detection.runtime.read(server)
    assert not reading.models
    known = (reading.running, reading.queued, reading.kv_use, reading.tokens_generated, reading.progress)
    assert known == (None,) * 5
