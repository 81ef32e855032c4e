"""The matching engine on plain values: each rule of the models guide, on both sides of its bound."""

from __future__ import annotations

from typing import Any

import pytest

from lucid_compute.registry.domain.node_state import DeclaredModel, NodeState
from lucid_compute.registry.domain.passports import ModelPassport, PassportStatus
from lucid_compute.registry.matching_engine import (
    ReasonCode,
    fit_reasons,
    hardware_compatible,
    has_available_compute,
    health_reasons,
    is_available_on,
    is_healthy,
    rejection_reasons,
    runtime_compatible,
    serves,
)
from tests.factories import NOW, model, node


def codes(model_: ModelPassport, node_: NodeState) -> list[ReasonCode]:
    """The codes of every reason against the node."""
    return [reason.code for reason in rejection_reasons(model_, node_, NOW)]


@pytest.mark.parametrize(
    ("metadata", "runtimes", "expected"),
    [
        ({"runtimes": ["vllm"]}, ["vllm"], True),
        ({"runtimes": ["vllm"]}, ["tgi"], False),
        ({"runtimes": ["vllm"], "runtimeRecommended": "tgi"}, ["tgi"], False),
        ({"runtimeRecommended": "tgi"}, ["tgi", "vllm"], True),
        ({"runtimeRecommended": "tgi"}, ["vllm"], False),
        ({"runtimes": []}, ["sglang"], True),
        ({}, ["tensorrt"], True),
        ({}, ["TensorRT-LLM"], True),
        ({}, ["ollama"], False),
        ({"format": "gguf"}, ["ollama"], True),
        ({"format": "gguf"}, ["llamacpp"], True),
        ({"format": "gguf"}, ["vllm"], True),
        ({"format": "gguf"}, ["tgi"], False),
    ],
)
def test_a_model_runs_where_it_shares_a_runtime(metadata: dict[str, Any], runtimes: list[str], expected: bool) -> None:
    """The listed runtimes decide, else the recommended one, else the format's; spellings don't matter."""
    assert runtime_compatible(model(metadata), node({"runtimes": runtimes})) is expected


def test_a_reported_runtime_counts_beside_the_registered_ones() -> None:
    """A node that registered no runtime names it in its heartbeat."""
    silent = node({"runtimes": None})
    telling = node({"runtimes": None}, beat={"runtime": {"name": "vLLM", "version": "0.9"}})
    assert not runtime_compatible(model(), silent)
    assert runtime_compatible(model(), telling)


def test_a_node_that_names_no_runtime_runs_only_the_models_it_declares_or_reports() -> None:
    """What it declares or reports is the only evidence."""
    wanted = model(name="llama", metadata={"aliases": ["meta/llama"]})
    assert not runtime_compatible(wanted, node({"runtimes": []}, declared=[DeclaredModel("other")]))
    assert runtime_compatible(wanted, node({"runtimes": []}, declared=[DeclaredModel("meta/llama")]))
    assert runtime_compatible(wanted, node({"runtimes": []}, beat={"availableModels": ["llama"]}))
    assert runtime_compatible(wanted, node({"runtimes": []}, declared=[DeclaredModel(wanted.id)]))


@pytest.mark.parametrize(
    ("vram", "minimum", "quantization", "expected"),
    [
        ("80GB", 80, None, True),
        ("80GB", 80.1, None, False),
        ("81920MiB", 80, None, True),
        (79.9, 80, None, False),
        ("80GB", {"fp16": 140, "awq-4bit": 40}, "fp16", False),
        ("80GB", {"fp16": 140, "awq-4bit": 40}, "AWQ-4bit", True),
        ("80GB", {"fp16": 140, "awq-4bit": 40}, "gptq", True),
        ("39GB", {"fp16": 140, "awq-4bit": 40}, None, False),
        ("1GB", None, None, True),
    ],
)
def test_vram_is_measured_against_the_declared_quantization(
    vram: str | float, minimum: Any, quantization: str | None, expected: bool
) -> None:
    """The bound is inclusive; an unknown quantization counts as the smallest minimum."""
    wanted = model({"minVramGb": minimum}, name="m")
    declaring = node({"vram": vram}, declared=[DeclaredModel("m", None, quantization)])
    assert hardware_compatible(wanted, declaring) is expected


@pytest.mark.parametrize(
    ("max_tokens", "max_context", "expected"),
    [(8192, None, True), (8191, None, False), (8191, 99999, False), (None, 8192, True), (None, 8191, False)],
)
def test_context_is_the_declared_one_or_else_the_nodes(
    max_tokens: int | None, max_context: int | None, expected: bool
) -> None:
    """`maxTokens` of this model overrides `maxContext`; without both there is no limit."""
    wanted = model({"contextLength": 8192}, name="m")
    declaring = node({"maxContext": max_context}, declared=[DeclaredModel("m", max_tokens)])
    assert hardware_compatible(wanted, declaring) is expected
    assert hardware_compatible(wanted, node())


@pytest.mark.parametrize(
    ("age_seconds", "expected"), [(0, True), (30, True), (30.001, False), (500, False), (-1, True)]
)
def test_a_node_is_healthy_for_thirty_seconds_inclusive(age_seconds: float, expected: bool) -> None:
    """The first row of the contract's table of ages."""
    assert is_healthy(node(age_seconds=age_seconds), NOW) is expected


def test_each_failing_rule_has_its_reason() -> None:
    """Every code of the contract, by a node that fails just that rule."""
    wanted = model({"minVramGb": 40, "contextLength": 4096}, name="m")
    assert codes(wanted, node()) == []
    assert codes(wanted, node({"runtimes": ["ollama"]})) == ["RUNTIME_MISMATCH"]
    assert codes(wanted, node({"vram": "24GB"})) == ["VRAM_TOO_LOW"]
    assert codes(wanted, node({"maxContext": 2048})) == ["CONTEXT_TOO_SHORT"]
    assert codes(wanted, node(age_seconds=31)) == ["HEARTBEAT_STALE"]
    assert codes(wanted, node(age_seconds=None)) == ["HEARTBEAT_MISSING"]
    assert codes(wanted, node(beat={"status": "unhealthy"})) == ["REPORTED_UNHEALTHY"]
    assert codes(wanted, node(beat={"status": "draining"})) == ["DRAINING"]
    assert codes(wanted, node(draining_since=NOW)) == ["DRAINING"]
    assert codes(wanted, node(deregistered_at=NOW)) == ["DEREGISTERED"]
    assert codes(wanted, node(status=PassportStatus.DEPRECATED)) == ["PASSPORT_INACTIVE"]


def test_every_reason_is_listed_and_not_only_the_first() -> None:
    """An operator can fix all of them at once."""
    wanted = model({"minVramGb": 100, "contextLength": 4096, "runtimes": ["tgi"]})
    broken = node({"maxContext": 100}, age_seconds=99, draining_since=NOW, beat={"status": "unhealthy"})
    assert codes(wanted, broken) == [
        "RUNTIME_MISMATCH",
        "VRAM_TOO_LOW",
        "CONTEXT_TOO_SHORT",
        "DRAINING",
        "REPORTED_UNHEALTHY",
        "HEARTBEAT_STALE",
    ]
    for reason in rejection_reasons(wanted, broken, NOW):
        assert reason.message.endswith(".")
        assert reason.wanted != reason.found


def test_reasons_and_predicates_are_one_verdict() -> None:
    """There are no reasons exactly where the predicates hold, rule by rule."""
    wanted = model({"minVramGb": 40}, name="m")
    for candidate in (node(), node({"vram": "24GB"}), node(age_seconds=31), node({"runtimes": []})):
        fits = runtime_compatible(wanted, candidate) and hardware_compatible(wanted, candidate)
        assert fits is not bool(fit_reasons(wanted, candidate))
        assert is_healthy(candidate, NOW) is not bool(health_reasons(candidate, NOW))
        assert is_available_on(wanted, candidate, NOW) is not bool(rejection_reasons(wanted, candidate, NOW))


def test_the_search_stops_at_the_first_node_that_passes() -> None:
    """`hasAvailableCompute` short-circuits, as the models guide says."""
    looked_at = []

    def nodes() -> Any:
        for name in ("stale", "good", "never"):
            looked_at.append(name)
            yield node(age_seconds=99 if name == "stale" else 0)

    assert has_available_compute(model(), nodes(), NOW)
    assert looked_at == ["stale", "good"]


def test_an_api_model_needs_no_node() -> None:
    """Models of format api are always available."""
    assert has_available_compute(model({"format": "api"}), [], NOW)
    assert not has_available_compute(model(), [], NOW)


def test_a_name_that_a_model_gave_up_no_longer_names_it() -> None:
    """Only an active model has its names; its id stays."""
    retired = model(name="m", status=PassportStatus.DEPRECATED)
    assert not serves(retired, node(declared=[DeclaredModel("m")]))
    assert serves(retired, node(declared=[DeclaredModel(retired.id)]))
