"""Each runtime is recognised by its own answers and read by its own names, as tests/fixtures/runtimes has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from lucid_compute.agent.gpu import GpuState
from lucid_compute.agent.node_report import load_of
from lucid_compute.agent.runtimes.detection import CERTAIN, GUESSED, LIKELY, Detection, detect
from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.runtimes.reading import ServedModel, ServerReading
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.shapes import ModelDeclaration
from tests.fault_answers import endless_body, redirect, respond
from tests.fault_node import Behaviour, Ending, FaultNode
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


@pytest.mark.parametrize(
    ("status", "is_declared", "is_loaded"),
    [
        ({"value": "loaded"}, True, True),
        ({"value": "loading"}, True, False),
        ({"value": "sleeping"}, True, False),
        ({"value": "unloaded"}, True, False),
        ({"value": "unloaded", "failed": True, "exit_code": 1}, False, False),
        ({"value": "downloading"}, False, False),
        ({"value": "error"}, False, False),
        ({}, False, False),
    ],
)
async def test_a_router_of_llama_cpp_declares_no_model_that_it_can_not_serve(
    status: dict[str, object], is_declared: bool, is_loaded: bool
) -> None:
    listed = {"data": [{"id": "a", "aliases": ["b"], "owned_by": "llamacpp", "status": status}]}
    models = saying(json.dumps(listed).encode())
    _, reading = await look("llama.cpp", v1__models=models, props=saying(b'{"role":"router"}'))
    assert [(model.id, model.is_loaded) for model in reading.models or ()] == [
        (name, is_loaded) for name in ("a", "b") if is_declared
    ]


async def test_a_router_that_loads_nothing_by_itself_declares_what_is_loaded() -> None:
    listed = [{"id": name, "status": {"value": name}, "owned_by": "llamacpp"} for name in ("loaded", "unloaded")]
    models, props = saying(json.dumps({"data": listed}).encode()), b'{"role":"router","models_autoload":false}'
    _, reading = await look("llama.cpp", v1__models=models, props=saying(props))
    assert [model.id for model in reading.models or ()] == ["loaded"]


@pytest.mark.parametrize("name", ["vllm-0.32.0", "sglang", "tgi"])
async def test_an_adapter_has_the_context_of_its_base(name: str) -> None:
    """It names none of its own; `tgi` stands for a server of no known runtime."""
    owner = {"vllm-0.32.0": "vllm", "sglang": "sglang", "tgi": "me"}[name]
    listed: list[dict[str, Any]] = [
        {"id": "on-an-adapter", "parent": "adapter"},
        {"id": "adapter", "parent": "base"},
        {"id": "own", "parent": "base", "max_model_len": 100},
        {"id": "base", "parent": None, "max_model_len": 4096, "root": "/models/base"},
        {"id": "other", "max_model_len": 8192},
        {"id": "of-a-name-that-is-not-served", "parent": "meta-llama/Llama-3"},
        {"id": "circle", "parent": "circle"},
    ]
    models = saying(json.dumps({"data": [{**entry, "owned_by": owner} for entry in listed]}).encode())
    unknown = {"info": NOTHING_THERE, "metrics": NOTHING_THERE} if name == "tgi" else {}
    _, reading = await look(name, v1__models=models, **unknown)
    assert {model.id: model.max_tokens for model in reading.models or ()} == {
        "on-an-adapter": 4096,
        "adapter": 4096,
        "own": 100,
        "base": 4096,
        "other": 8192,
        "of-a-name-that-is-not-served": 4096,
        "circle": 4096,
    }


RANKS = ((0, 0, 0.0), (0, 0, 0.01), (1, 11, 0.97), (0, 0, 0.0))


def sglang_ranks(label: str, ranks: Sequence[tuple[int, int, float]]) -> Behaviour:
    """The metrics of an SGLang with these ranks: requests that run, that wait, and the cache in use."""
    lines = [
        f'sglang:{name}{{engine_type="unified",model_name="m",{label}="{number}"}} {value}'
        for number, rank in enumerate(ranks)
        for name, value in zip(("num_running_reqs", "num_queue_reqs", "token_usage"), rank, strict=True)
    ]
    return saying("\n".join(lines).encode())


async def test_sglang_is_as_full_as_its_fullest_data_parallel_rank() -> None:
    detection, reading = await look("sglang", metrics=sglang_ranks("dp_rank", RANKS))
    assert (reading.running, reading.queued, reading.fullest_rank) == (1, 11, 0.97)
    assert load_of(reading, GpuState(None), None) == 0.97
    busy = [(30, 0, 0.2), (0, 0, 0.1), (2, 0, 0.1), (0, 0, 0.0)]  # 30 of the rank's 32
    _, reading = await look("sglang", metrics=sglang_ranks("dp_rank", busy))
    assert detection.runtime.name == "sglang"
    assert load_of(reading, GpuState(None), None) == 30 / 32
    _, reading = await look("sglang", metrics=sglang_ranks("tp_rank", RANKS))  # one engine, which is not so full
    assert (reading.fullest_rank, load_of(reading, GpuState(None), None)) == (None, 1 / 128)


async def test_vllm_of_several_engines_is_as_full_as_its_fullest() -> None:
    text = "".join(
        f'vllm:num_requests_running{{engine="{engine}"}} 1\nvllm:kv_cache_usage_perc{{engine="{engine}"}} {use}\n'
        for engine, use in ((0, 0.1), (1, 0.9))
    )
    _, reading = await look("vllm-0.32.0", metrics=saying(text.encode()))
    assert load_of(reading, GpuState(None), 200) == 0.9


async def test_names_that_the_registry_does_not_take_are_left_out_with_a_line_in_the_log() -> None:
    """Real ids fit: the path of a file is one. What is left out is said, and does not vanish."""
    path = f"/models/cache/hub/{'models--' * 30}/snapshots/0123456789abcdef/model-Q4_K_M.gguf"
    fits = [path, "a" * 512, "name with\u00a0a\u200bspace", "模型"]
    names = [*fits, "b" * 513, "line\nbreak", "half \ud83d", "\x7f"]
    models = saying(json.dumps({"data": [{"id": name} for name in names]}).encode())
    _, reading = await look("tgi", info=NOTHING_THERE, metrics=NOTHING_THERE, v1__models=models)
    assert {model.id for model in reading.models or ()} == set(fits)
    (note,) = reading.notes
    assert note.startswith("4 models are left out")
    assert note.isprintable()
    for model in reading.models or ():
        ModelDeclaration(id=model.id)
        fields = {"passport_id": "p", "status": "healthy", "load": None, "queue_depth": None}
        Heartbeat.model_validate({**fields, "available_models": [model.id]}, by_name=True)


async def test_models_beyond_the_bound_are_noted() -> None:
    models = saying(json.dumps({"data": [{"id": f"m{number}"} for number in range(1002)]}).encode())
    _, reading = await look("tgi", info=NOTHING_THERE, metrics=NOTHING_THERE, v1__models=models)
    assert len(reading.models or ()) == 1000
    assert reading.notes[0].startswith("2 models are left out")


IMITATORS: dict[str, dict[str, Any]] = {
    "LocalAI": {
        "/api/version": {"version": "0.9.0"},
        "/api/tags": {"models": [{"name": "qwen3-4b:latest", "model": "qwen3-4b:latest"}]},
        "/v1/models": {"data": [{"id": "qwen3-4b", "object": "model"}]},
        "/version": {"version": "v3.9.0 (abc)"},
    },
    "Lemonade": {
        "/api/version": {"version": "0.16.2"},
        "/api/tags": {"models": [{"name": "Qwen3-0.6B-GGUF:latest", "model": "Qwen3-0.6B-GGUF:latest"}]},
        "/v1/models": {"data": [{"id": "Qwen3-0.6B-GGUF", "owned_by": "lemonade"}]},
    },
    "KoboldCpp": {
        "/api/version": {"version": "0.7.0"},
        "/api/tags": {"models": [{"name": "koboldcpp/qwen:latest", "model": "koboldcpp/qwen:latest"}]},
        "/v1/models": {"data": [{"id": "koboldcpp/qwen", "owned_by": "koboldcpp"}]},
        "/props": {"default_generation_settings": {"n_ctx": 8192}, "total_slots": 1},
    },
    "one with Ollama's ids": {
        "/api/version": {"version": "0.9.0"},
        "/api/tags": {"models": [{"name": "qwen:latest", "model": "qwen:latest"}]},
        "/v1/models": {"data": [{"id": "qwen:latest", "owned_by": "somebody"}]},
    },
}


@pytest.mark.parametrize("name", IMITATORS)
async def test_what_speaks_ollamas_api_too_is_not_ollama_whatever_is_loaded(name: str) -> None:
    """The models are those that /v1/models serves, and the verdict does not flip with load."""
    answers, found = IMITATORS[name], list[tuple[str, object]]()
    states: tuple[Any, ...] = (None, [], answers["/api/tags"]["models"])
    for loaded in states:
        async with FaultNode(NOTHING_THERE) as node:
            pages = {**answers, "/api/ps": {"models": loaded}}
            node.by_path |= {path: saying(json.dumps(page).encode()) for path, page in pages.items()}
            node.by_path["/"] = saying(b"Ollama is running", "text/plain")
            server = InferenceServer(node.url)
            detection = await detect(server)
            assert detection is not None
            found.append((detection.shown_name, (await detection.runtime.read(server)).models))
            await server.close()
    (served,) = answers["/v1/models"]["data"]
    assert found == [("openai-compatible", (ServedModel(id=served["id"]),))] * 3


@pytest.mark.parametrize("loaded", [b'{"models":[]}', b'{"models":null}'])
async def test_ollama_is_ollama_whatever_is_loaded(loaded: bytes) -> None:
    detection, _ = await look("ollama", api__ps=saying(loaded))
    assert (detection.runtime.name, detection.confidence) == ("ollama", CERTAIN)


@pytest.mark.parametrize(
    ("name", "owner"),
    [("qwen3:4b", "library"), ("user/qwen3:latest", "user"), ("hf.co/hers/Q-GGUF:Q4", "hers")],
)
async def test_ollama_says_the_namespace_of_a_model_as_its_owner(name: str, owner: str) -> None:
    tags = saying(json.dumps({"models": [{"name": name, "model": name}]}).encode())
    listed = saying(json.dumps({"data": [{"id": name, "owned_by": owner}]}).encode())
    detection, _ = await look("ollama", api__tags=tags, v1__models=listed)
    assert (detection.runtime.name, detection.confidence) == ("ollama", CERTAIN)


async def test_ollama_without_a_model_is_guessed_by_its_greeting() -> None:
    empty = {"api__tags": saying(b'{"models":[]}'), "api__ps": saying(b'{"models":[]}')}
    empty["v1__models"] = saying(b'{"object":"list","data":null}')
    async with recorded_server("ollama", **empty) as (node, server):
        assert await detect(server) is None
        node.by_path["/"] = saying(b"Ollama is running", "text/plain")
        detection = await detect(server)
    assert detection is not None
    assert (detection.runtime.name, detection.confidence) == ("ollama", GUESSED)


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
