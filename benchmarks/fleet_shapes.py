"""The fleet that reads are measured over: nodes of 2,000 kinds, and 1,000 models of which no node can run half."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.fleet_rows import NodeRow, node_id

KINDS = 2000
MODELS = 1000
_RUNTIMES = (["vllm"], ["vllm", "sglang"], ["llama.cpp"], ["ollama"], ["vllm", "llama.cpp", "tgi"])
_CONTEXTS = (8_192, 32_768, 131_072, None)
_VRAM_GB = (24, 32, 48, 64, 80, 96, 141, 192, 288, 640)


def nodes_of_many_kinds(count: int) -> list[NodeRow]:
    """Return nodes spread evenly over the kinds; fewer nodes than kinds are of kinds drawn from all."""
    kinds = Random(1).sample(range(KINDS), KINDS)
    return [NodeRow(node_id(number), *_kind(kinds[number % KINDS])) for number in range(count)]


def models() -> list[dict[str, Any]]:
    """Return the metadata of every model: the even ones run on most kinds, the odd ones on none."""
    return [_model(number) for number in range(MODELS)]


def _kind(kind: int) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a kind's nodes, and the models that they declare: 200 kinds of machine by 10 lists."""
    machine, declaration = divmod(kind, 10)
    metadata = {
        "vram": f"{_VRAM_GB[machine % 10]}GB",
        "runtimes": _RUNTIMES[machine // 10 % 5],
        "maxContext": _CONTEXTS[machine // 50],
        "inferenceUrl": "http://node:8080/v1",
        "region": "us-east-1",
    }
    return metadata, [f"model-{(declaration * 100 + step * 2) % MODELS}" for step in range(5)]


def _model(number: int) -> dict[str, Any]:
    if number % 2 == 0:
        return {"format": "gguf" if number % 4 else "safetensors", "minVramGb": 4 + number % 16, "contextLength": 8192}
    if number % 4 == 1:
        return {"format": "safetensors", "minVramGb": 2000, "contextLength": 8192}
    return {"format": "safetensors", "runtimes": ["tensorrt"], "minVramGb": 16, "contextLength": 8192}
