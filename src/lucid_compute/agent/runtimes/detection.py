"""Detect the runtime at a URL: the queries, what each response proves, and how certain the result is."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
from lucid_compute.agent.runtimes.llama_cpp import LlamaCpp
from lucid_compute.agent.runtimes.ollama import Ollama
from lucid_compute.agent.runtimes.reading import OpenAiCompatible, Runtime, as_label, is_model_id, models_listed
from lucid_compute.agent.runtimes.sglang import Sglang
from lucid_compute.agent.runtimes.tgi import Tgi
from lucid_compute.agent.runtimes.vllm import Vllm

CERTAIN = 1.0  # two responses prove it
LIKELY = 0.7  # one response proves it, and no other server is known to imitate it
GUESSED = 0.3  # OpenAI's API, and nothing else was recognised
_QUESTIONS = (
    *("/v1/models", "/version", "/server_info", "/props", "/info", "/metrics"),
    *("/api/version", "/api/tags", "/api/ps", "/"),
)
_OLLAMAS_GREETING = "Ollama is running"
_UNAUTHORIZED = frozenset({401, 403})


class Detection(NamedTuple):
    """The runtime, the confidence (0 to 1), and the evidence in words."""

    runtime: Runtime
    confidence: float
    evidence: tuple[str, ...]

    @property
    def shown_name(self) -> str:
        """The runtime's name for a person."""
        return self.runtime.name or "openai-compatible"


class _Answers(NamedTuple):
    """All responses, and what `/v1/models` says about the owners of its models."""

    by_path: Mapping[str, ServerResponse]
    owners: frozenset[str]
    ids: frozenset[str]

    def fields(self, path: str) -> dict[str, Any]:
        return self.by_path[path].fields


async def detect(server: InferenceServer) -> Detection | None:
    """Return the runtime of the server; None when no response is that of an inference server.

    The order matters: SGLang serves Ollama's paths too, and several runtimes answer /version.
    """
    answers = await _ask(server)
    for recognise in (_as_vllm, _as_sglang, _as_llama_cpp, _as_tgi, _as_ollama, _as_openai_compatible):
        if (found := recognise(answers)) is not None:
            return found
    return None


async def _ask(server: InferenceServer) -> _Answers:
    given = await asyncio.gather(*(server.get(path) for path in _QUESTIONS))
    by_path = dict(zip(_QUESTIONS, given, strict=True))
    if not by_path["/server_info"].is_ok:
        by_path["/server_info"] = await server.get("/get_server_info")
    entries = models_listed(by_path["/v1/models"]) or []
    owners = frozenset(str(entry.get("owned_by")) for entry in entries)
    return _Answers(by_path, owners, frozenset(str(entry["id"]) for entry in entries))


def _as_vllm(answers: _Answers) -> Detection | None:
    version = as_label(answers.fields("/version").get("version"))
    has_metrics = _has_metrics(answers, "vllm:")
    evidence = _list(
        ("vllm" in answers.owners, "/v1/models: owned_by vllm"),
        (has_metrics, "/metrics: vllm:…"),
        (version is not None, f"/version: {version}"),
    )
    if "vllm" not in answers.owners and not has_metrics:
        return None  # /version alone proves nothing
    return Detection(Vllm(version), _confidence(evidence), evidence)


def _as_sglang(answers: _Answers) -> Detection | None:
    info = answers.fields("/server_info")
    is_info = "version" in info and ("max_total_num_tokens" in info or "tp_size" in info)
    is_locked = answers.by_path["/server_info"].status in _UNAUTHORIZED
    proofs = _list(
        ("sglang" in answers.owners, "/v1/models: owned_by sglang"),
        (is_info, f"/server_info: {info.get('version')}"),
        (_has_metrics(answers, "sglang:"), "/metrics: sglang:…"),
    )
    if not proofs:
        return None
    evidence = proofs + _list((is_locked, "/server_info wants a key: give the agent the server's key"))
    return Detection(Sglang.from_info(info), _confidence(proofs), evidence)


def _as_llama_cpp(answers: _Answers) -> Detection | None:
    props = answers.fields("/props")
    build = as_label(props.get("build_info"))
    is_props = build is not None and "default_generation_settings" in props
    evidence = _list(
        ("llamacpp" in answers.owners, "/v1/models: owned_by llamacpp"), (is_props, f"/props: build_info {build}")
    )
    return Detection(LlamaCpp(build), _confidence(evidence), evidence) if evidence else None


def _as_tgi(answers: _Answers) -> Detection | None:
    info = answers.fields("/info")
    model_id, version = info.get("model_id"), as_label(info.get("version"))
    if not is_model_id(model_id) or ("max_total_tokens" not in info and "router" not in info):
        return None
    proofs = _list(
        (True, f"/info: model_id {model_id}, version {version}"),
        (model_id in answers.owners and model_id in answers.ids, "/v1/models: owned_by is the model's id"),
        (_has_metrics(answers, "tgi_"), "/metrics: tgi_…"),
    )
    return Detection(Tgi(version), _confidence(proofs), proofs)


def _as_ollama(answers: _Answers) -> Detection | None:
    """Recognise Ollama by its two lists of models, which agree.

    Others speak its API beside their own (LocalAI, Lemonade, KoboldCpp): their models have another id in /v1/models,
    or another owner. What is loaded says nothing. Without any model the greeting is a hint, and no proof.
    """
    version = as_label(answers.fields("/api/version").get("version"))
    tags, loaded = answers.fields("/api/tags"), answers.fields("/api/ps")
    if version is None or "models" not in tags or "models" not in loaded:
        return None
    evidence = (f"/api/version: {version}", "/api/ps: a list of loaded models")
    if not answers.ids and not tags["models"]:
        is_greeted = answers.by_path["/"].text.strip() == _OLLAMAS_GREETING
        return Detection(Ollama(version), GUESSED, (*evidence, "/: its greeting")) if is_greeted else None
    if not any(_is_ollamas(entry, tags["models"]) for entry in models_listed(answers.by_path["/v1/models"]) or []):
        return None
    return Detection(Ollama(version), CERTAIN, (*evidence, "/v1/models: the models of /api/tags, and their namespaces"))


def _is_ollamas(entry: Mapping[str, Any], tags: object) -> bool:
    """Return whether a model of /v1/models is one of /api/tags, owned by its namespace, which is usually `library`."""
    name = str(entry["id"])
    namespace = ["library", *name.rpartition(":")[0].split("/")[:-1]][-1]
    is_tagged = any(isinstance(tag, dict) and name in {tag.get("model"), tag.get("name")} for tag in _listed(tags))
    return is_tagged and entry.get("owned_by") == namespace


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _as_openai_compatible(answers: _Answers) -> Detection | None:
    answer = answers.by_path["/v1/models"]
    if models_listed(answer) is not None:
        return Detection(OpenAiCompatible(), GUESSED, ("/v1/models: a list of models, of no runtime that is known",))
    if answer.status in _UNAUTHORIZED:
        return Detection(OpenAiCompatible(), GUESSED, (f"/v1/models: {answer.status}, it wants a key",))
    return None


def _has_metrics(answers: _Answers, prefix: str) -> bool:
    text = answers.by_path["/metrics"].text
    return text.startswith(prefix) or f"\n{prefix}" in text


def _list(*claims: tuple[bool, str]) -> tuple[str, ...]:
    return tuple(words for holds, words in claims if holds)


def _confidence(evidence: Collection[str]) -> float:
    return CERTAIN if len(evidence) > 1 else LIKELY
