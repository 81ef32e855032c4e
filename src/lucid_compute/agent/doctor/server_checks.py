"""Checks of the inference server from here: does it respond, which runtime is it, what does it serve."""

from __future__ import annotations

from lucid_compute.agent.doctor.check import CheckFinding, DoctorContext, failed, passed, skipped, warned
from lucid_compute.agent.runtimes.detection import detect
from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.runtimes.reading import models_listed

METRICS_FLAGS = {
    "llama.cpp": "Start llama-server with --metrics.",
    "sglang": "Start SGLang with --enable-metrics.",
    "vllm": "Let this machine read vLLM's /metrics: something before it keeps the path away.",
    "tgi": "Let this machine read TGI's /metrics: something before it keeps the path away.",
}
_KEY_WANTED = frozenset({401, 403})
_OK = 200


async def check_server(context: DoctorContext) -> CheckFinding:
    """Does the inference server respond from here?"""
    context.server = InferenceServer(context.url, context.inference_key)
    context.listed = answer = await context.server.get("/v1/models")
    if answer.fault is not None:
        fix = f"Start the inference server, or say where it is from here: --url (now {context.url})"
        if context.is_at_registered_url:
            fix = "Run this on the node's machine and say where its server is: lucid doctor --url http://localhost:8000"
        return failed(f"{context.url} {answer.fault}.", fix)
    if answer.status in _KEY_WANTED:
        return failed(
            f"{context.url} wants another key than it was given (status {answer.status}).",
            "Give the server's key to this machine: LUCID_AGENT_INFERENCE_KEY or --inference-key",
        )
    if models_listed(answer) is None:
        return failed(
            f"{context.url} answers {context.server.models_path} with status {answer.status} and no list of models.",
            "Say the base URL of the inference server itself, to which /chat/completions is added: --url",
        )
    return passed(f"{context.url} answers from here.")


async def check_runtime(context: DoctorContext) -> CheckFinding:
    """Is it the runtime that the node is registered with?"""
    detection = await detect(context.server)
    if detection is None:
        list_url = f"{context.server.url}{context.server.models_path}"
        fix = f"Look at the inference server's log, and whether it answers: curl {list_url}"
        return failed("It stopped answering while it was looked at.", fix)
    context.detection = detection
    context.reading = await detection.runtime.read(context.server)
    name, named = detection.runtime.name, context.runtimes
    described = f"{detection.shown_name} {detection.runtime.version or ''}".strip()
    update = f"lucid passports update {context.called} --set"
    if name is None:
        return skipped("It speaks OpenAI's API and does not say which runtime it is.")
    if not named:
        fix = f"Name it, so that models which ask for it are matched: {update} 'runtimes=[\"{name}\"]'"
        return warned(f"It is {described}, and the node names no runtime.", fix)
    if name not in named:
        fix = f"Register the runtime that runs: {update} 'runtimes=[\"{name}\"]'"
        return failed(f"It is {described}, and the node is registered with {', '.join(named)}.", fix)
    return passed(f"It is {described} ({'; '.join(detection.evidence)}).")


async def check_metrics(context: DoctorContext) -> CheckFinding:
    """Can the agent read how busy the server is?"""
    name = context.detection.runtime.name
    if name not in METRICS_FLAGS:
        return skipped(f"{context.detection.shown_name} has no metrics that are read.")
    answer = await context.server.get("/metrics")
    if answer.status == _OK:
        return passed("/metrics answers.")
    described = answer.fault or f"answers status {answer.status}"
    return warned(f"/metrics {described}: load and a wedged server are not seen in full.", METRICS_FLAGS[name])


async def check_models(context: DoctorContext) -> CheckFinding:
    """Does the server serve what the node declares and reports?"""
    reported = context.model_ids
    served = {str(entry["id"]) for entry in models_listed(context.listed) or []}
    served |= {model.id for model in context.reading.models or ()}
    shown = ", ".join(sorted(served)) or "none"
    if not reported:
        return failed(
            f"The node declares and reports no model; the server lists: {shown}.",
            "Load a model and let the agent declare it: lucid agent run",
        )
    missing = [model for model in reported if model not in served and f"{model}:latest" not in served]
    if missing:
        return failed(
            f"The server does not serve {', '.join(missing)}; it lists: {shown}.",
            "Load what is missing under that name, or declare what is loaded: lucid agent run declares it",
        )
    return passed(f"The server serves {', '.join(reported)}.")


async def check_context(context: DoctorContext) -> CheckFinding:
    """Does the server take as many tokens as the node declares?"""
    limits = {model.id: model.max_tokens for model in context.reading.models or () if model.max_tokens}
    declared = {model.id: model.max_tokens for model in context.declaration.models if model.max_tokens}
    known = [name for name in declared if name in limits]
    if not known:
        return skipped("Nothing is declared about context, or the server does not say.")
    for name in known:
        if (declared[name] or 0) > (limits[name] or 0):
            return failed(
                f"{name} is declared with {declared[name]} tokens; the server takes {limits[name]}.",
                f"Start the server with a longer context, or declare maxTokens {limits[name]}: lucid agent run does",
            )
    return passed("The server takes as many tokens as are declared.")
