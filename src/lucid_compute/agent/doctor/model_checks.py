"""Checks of the node's models in the registry: are they known, do they fit, and if not, why."""

from __future__ import annotations

from collections import defaultdict

from lucid_compute.agent.doctor.check import CheckFinding, DoctorContext, failed, passed, skipped, warned
from lucid_compute.agent.doctor.reason_fixes import fix_of
from lucid_compute.client.errors import ModelNotFound
from lucid_compute.registry.shapes import ReasonView

MB_PER_GB = 1024
TOLERANCE_GB = 1.0  # drivers keep some of the memory for themselves


async def check_catalogue(context: DoctorContext) -> CheckFinding:
    """Is there a model passport for what the node serves?"""
    context.models = {}
    for name in context.model_ids:
        try:
            context.models[name] = (await context.lucid.models.get(name)).id
        except ModelNotFound:
            continue
    unknown = [name for name in context.model_ids if name not in context.models]
    fix = (
        f"Register the model, or add this id to its aliases: lucid passports create {(unknown or [''])[0]} --type model"
    )
    if not context.model_ids:
        return skipped("The node declares and reports no model.")
    if not context.models:
        return failed(f"Nobody has registered {', '.join(unknown)}: no request can ask for it.", fix)
    if unknown:
        return warned(f"Nobody has registered {', '.join(unknown)}: no request can ask for it.", fix)
    return passed(f"Registered: {', '.join(context.models)}.")


async def check_vram(context: DoctorContext) -> CheckFinding:
    """Does the node have as much memory as its passport says?"""
    registered_gb, gpus = (
        context.metadata_number("vramGb"),
        context.health.reported.gpus if context.health.reported else None,
    )
    totals = [gpu.memory_total_mb for gpu in gpus or ()]
    if registered_gb is None or not totals or None in totals:
        return skipped("The node reports no GPU memory to compare with its passport.")
    seen_gb = sum(total or 0 for total in totals) / MB_PER_GB
    sentence = f"The passport says {registered_gb:g} GB, its GPUs have {seen_gb:.1f} GB."
    if registered_gb > seen_gb + TOLERANCE_GB:
        fix = f"Register what there is: lucid passports update {context.called} --set vram={seen_gb:.0f}GB"
        return failed(sentence, fix)
    return passed(sentence)


async def check_fit(context: DoctorContext) -> CheckFinding:
    """Does the node have the memory that its models need?"""
    reasons = await _reasons(context)
    named = {name: view for (code, name), view in reasons.items() if code == "VRAM_TOO_LOW"}
    context.reported_codes.add("VRAM_TOO_LOW")
    if named:
        sentence = "; ".join(f"{name} wants {view.wanted} GB of {view.found} GB" for name, view in named.items())
        return failed(f"Too little VRAM: {sentence}.", fix_of("VRAM_TOO_LOW", context.called))
    return passed("The node has the VRAM that its models want.")


async def check_availability(context: DoctorContext) -> list[CheckFinding]:
    """What other reasons does /availability give against this node? Reasons of earlier checks are left out."""
    by_code: dict[str, list[str]] = defaultdict(list)
    messages: dict[str, str] = {}
    for (code, name), view in (await _reasons(context)).items():
        if code not in context.reported_codes:
            by_code[code].append(name)
            messages[code] = view.message
    findings = [
        failed(f"{code} for {', '.join(names)}: {messages[code]}", fix_of(code, context.called))
        for code, names in sorted(by_code.items())
    ]
    return findings or [passed(f"There is no other reason against the node for {', '.join(context.models)}.")]


async def _reasons(context: DoctorContext) -> dict[tuple[str, str], ReasonView]:
    """Return every reason against this node, by its code and the model's name."""
    if context.reasons is None:
        context.reasons = {}
        for name, model_id in context.models.items():
            answer = await context.lucid.models.availability(model_id)
            for node in answer.nodes:
                if node.passport_id == context.node.id:
                    context.reasons.update({(reason.code, name): reason for reason in node.reasons})
    return context.reasons
