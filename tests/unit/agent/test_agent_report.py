"""What is said of a node follows from what was seen, and what was not seen is unknown."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lucid_compute.agent.gpu import GpuState
from lucid_compute.agent.node_report import NOT_LOOKED_AT, declaration_of, heartbeat_of, load_of, metadata_of
from lucid_compute.agent.observer import Seen
from lucid_compute.agent.runtimes.detection import Detection
from lucid_compute.agent.runtimes.llama_cpp import LlamaCpp
from lucid_compute.agent.runtimes.ollama import Ollama
from lucid_compute.agent.runtimes.reading import NOTHING_READ, OpenAiCompatible, Runtime, ServedModel, ServerReading
from lucid_compute.agent.runtimes.sglang import Sglang
from lucid_compute.agent.runtimes.tgi import Tgi
from lucid_compute.agent.runtimes.vllm import Vllm
from lucid_compute.agent.server_watch import Observation
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.registry.domain.node_state import GpuReading, Heartbeat

BUSY = ServerReading(
    models=(ServedModel(id="a", max_tokens=4096), ServedModel(id="b", max_tokens=8192, is_loaded=False)),
    running=3,
    queued=2,
    kv_use=0.5,
    tokens_generated=700,
)
NO_GPU = GpuState(None, "no driver")
GPUS = GpuState(
    (
        GpuReading.model_validate({"index": 0, "name": "A100", "utilization": 1.0, "memoryTotalMb": 81920.0}),
        GpuReading.model_validate({"index": 1, "name": "A100", "utilization": 0.5, "memoryTotalMb": 81920.0}),
    )
)


def seen(reading: ServerReading = BUSY, fault: str | None = None, gpus: GpuState = NO_GPU) -> Seen:
    """A vLLM that was looked at."""
    return Seen(Observation(0.0, Detection(Vllm("0.9"), 1.0, ()), reading, fault), gpus)


def settings(**changes: object) -> AgentSettings:
    """Settings of an agent at http://gpu:8000."""
    return AgentSettings.model_validate({"url": "http://gpu:8000", **changes})


def test_a_busy_server_is_reported_as_it_is() -> None:
    fields = heartbeat_of(seen(gpus=GPUS), settings(), stops=False)
    heartbeat = Heartbeat.model_validate({"passport_id": "p", **fields}, by_name=True)
    assert (heartbeat.status, heartbeat.load, heartbeat.queue_depth, heartbeat.in_flight) == ("healthy", 0.5, 2, 3)
    assert heartbeat.available_models == ["a"]  # b is loaded when it is asked for
    assert (heartbeat.tokens_generated, heartbeat.jobs_completed, heartbeat.detail) == (700, None, None)
    assert heartbeat.runtime is not None
    assert (heartbeat.runtime.name, heartbeat.runtime.version) == ("vllm", "0.9")
    assert len(heartbeat.gpus or ()) == 2


def test_what_was_not_seen_is_null_and_the_node_unhealthy() -> None:
    fields = heartbeat_of(Seen(None, GpuState(None)), settings(), stops=False)
    assert fields.pop("status") == "unhealthy"
    assert fields.pop("detail") == NOT_LOOKED_AT
    assert fields.pop("available_models") == []
    assert set(fields.values()) == {None}


def test_a_server_that_can_not_serve_reports_no_model_and_declares_nothing_new() -> None:
    fields = heartbeat_of(seen(fault="it is wedged"), settings(), stops=False)
    assert (fields["status"], fields["detail"], fields["available_models"]) == ("unhealthy", "it is wedged", [])
    assert declaration_of(seen(fault="it is wedged"), settings()) is None
    assert declaration_of(seen(NOTHING_READ), settings()) is None


def test_an_agent_that_stops_drains_whatever_the_server_does() -> None:
    assert heartbeat_of(seen(fault="dead"), settings(), stops=True)["status"] == "draining"


def test_a_missing_gpu_is_a_detail_and_no_gpu_at_all_is_none() -> None:
    lost = GPUS._replace(detail="a GPU fell off the bus")
    assert heartbeat_of(seen(gpus=lost), settings(), stops=False)["detail"] == "a GPU fell off the bus"
    assert heartbeat_of(seen(gpus=NO_GPU), settings(), stops=False)["detail"] is None


@pytest.mark.parametrize(
    ("reading", "limit", "load"),
    [
        (ServerReading(running=3, kv_use=0.5), 4, 0.75),
        (ServerReading(running=9, max_concurrency=4), None, 1.0),
        (ServerReading(running=0, max_concurrency=4, kv_use=0.9), None, 0.0),
        (ServerReading(running=3, kv_use=0.5), None, 0.5),
        (ServerReading(running=3), None, 0.75),  # by the GPUs
        (NOTHING_READ, 4, 0.75),
        (ServerReading(running=1, max_concurrency=100, kv_use=0.9, fullest_rank=0.9), None, 0.9),
        (ServerReading(running=99, max_concurrency=100, fullest_rank=0.9), None, 0.99),
    ],
)
def test_load_is_the_share_of_requests_then_of_the_cache_then_of_the_gpus(
    reading: ServerReading, limit: int | None, load: float
) -> None:
    assert load_of(reading, GPUS, limit) == load
    assert load_of(NOTHING_READ, NO_GPU, limit) is None


def test_a_passport_holds_what_is_known_and_options_go_first() -> None:
    known = metadata_of(seen(gpus=GPUS), settings(region="eu", price_per_1k_tokens="0.0020"))
    assert known == {
        "gpu": "A100",
        "gpuCount": 2,
        "vram": "163840MiB",
        "inferenceUrl": "http://gpu:8000",
        "region": "eu",
        "capabilities": ["inference"],
        "runtimes": [{"name": "vllm", "version": "0.9"}],
        "maxContext": 4096,
        "pricePer1kTokens": "0.0020",
    }
    told = metadata_of(seen(gpus=GPUS), settings(vram="24GB", gpu="mine", max_concurrency=8, public_url="https://x/v1"))
    assert (told["vram"], told["gpu"], told["maxConcurrency"], told["inferenceUrl"]) == (
        "24GB",
        "mine",
        8,
        "https://x/v1",
    )
    assert "vram" not in metadata_of(seen(), settings())


@pytest.mark.parametrize(
    ("runtime", "vram"),
    [
        (LlamaCpp("b1"), "24000MiB"),
        (Ollama("0.12"), "24000MiB"),
        (Vllm("0.9"), None),
        (Sglang("0.5"), None),
        (Tgi("3"), None),
        (OpenAiCompatible(), None),
    ],
)
def test_main_memory_counts_only_for_a_runtime_that_serves_from_it(runtime: Runtime, vram: str | None) -> None:
    """The others serve from a GPU that NVML does not show: how much it has, a person says."""
    without_driver = GpuState(None, "no driver", 24_000)
    server = Seen(Observation(0.0, Detection(runtime, 1.0, ()), BUSY, None), without_driver)
    assert metadata_of(server, settings()).get("vram") == vram
    assert metadata_of(server, settings(vram="8GB"))["vram"] == "8GB"
    assert "vram" not in metadata_of(Seen(None, without_driver), settings())


def test_a_context_that_not_every_model_tells_is_nobodys() -> None:
    models = (ServedModel(id="a", max_tokens=4096), ServedModel(id="b"))
    assert "maxContext" not in metadata_of(seen(ServerReading(models=models)), settings())


def test_an_unknown_runtime_is_not_named() -> None:
    """A node that names a runtime of which the registry knows no model's format would be matched with nothing."""
    what = Seen(Observation(0.0, Detection(OpenAiCompatible(), 0.3, ()), BUSY, None), NO_GPU)
    assert "runtimes" not in metadata_of(what, settings())
    assert heartbeat_of(what, settings(), stops=False)["runtime"] is None


def test_only_wanted_models_are_declared_with_the_quantization_that_was_told() -> None:
    told = settings(models="b", quantization="fp16,b=awq-4bit")
    assert declaration_of(seen(), told) == [{"id": "b", "max_tokens": 8192, "quantization": "awq-4bit"}]
    assert [each["quantization"] for each in declaration_of(seen(), settings(quantization="fp16")) or []] == [
        "fp16"
    ] * 2


@pytest.mark.parametrize(
    ("url", "api", "is_out_of_reach"),
    [
        ("http://localhost:8000", "https://lucid.example", True),
        ("http://[::1]:8000", "https://lucid.example", True),
        ("http://127.0.0.1:8000/v1", "http://localhost:8000", False),
        ("http://gpu:8000", "https://lucid.example", False),
    ],
)
def test_a_registry_elsewhere_is_not_told_of_this_machines_loopback(url: str, api: str, is_out_of_reach: bool) -> None:
    assert settings(url=url).is_out_of_reach(api) is is_out_of_reach
    assert settings(url=url, public_url="http://gpu:1").is_out_of_reach(api) is False


@pytest.mark.parametrize(
    ("url", "api", "is_the_registry"),
    [
        ("http://localhost:8000", "http://127.0.0.1:8000", True),
        ("http://lucid.example/v1", "http://lucid.example:80", True),
        ("http://127.0.0.1:8000", "http://127.0.0.2:8000", False),
        ("http://localhost:8080", "http://localhost:8000", False),
    ],
)
def test_the_registry_is_not_taken_for_an_inference_server(url: str, api: str, is_the_registry: bool) -> None:
    """Both listen on 8000 unless they are told otherwise."""
    assert settings(url=url).is_the_registry(api) is is_the_registry


def test_a_name_is_the_machines_and_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "rack-1")
    assert settings(url="http://localhost:8001/v1").node_name == "rack-1-8001"
    assert settings(url="https://localhost").node_name == "rack-1-443"
    assert settings(name="mine").node_name == "mine"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCID_AGENT_URL", "http://localhost:11434")
    monkeypatch.setenv("LUCID_AGENT_GPUS", "0, 2")
    monkeypatch.setenv("LUCID_AGENT_CAPABILITIES", "inference,fine-tuning")
    read = AgentSettings()
    assert (read.url, read.gpus, read.capabilities) == (
        "http://localhost:11434",
        ("0", "2"),
        ("inference", "fine-tuning"),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://gpu"},
        {"url": "http://user:secret@gpu"},
        {"vram": "much"},
        {"gpus": "first"},
        {"price_per_1k_tokens": "cheap"},
        {"max_concurrency": 0},
        {"quantization": "fp16,fp8"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_are_refused_and_secrets_not_repeated(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(**wrong)
    assert "secret" not in "".join(str(fault["msg"]) for fault in refused.value.errors())
