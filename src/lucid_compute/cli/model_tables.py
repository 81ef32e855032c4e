"""Models as a person reads them, and why one can't be had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from lucid_compute.cli.output import Column, Listing, facts, sentence
from lucid_compute.cli.plain_text import UNKNOWN, counted, listed, number, or_unknown, yes_or_no
from lucid_compute.cli.remedies import remedy
from lucid_compute.wire.passports import ModelAvailability, ModelView, ReasonView

MODEL_COLUMNS = (
    Column("NAME", shortest=16),
    Column("AVAILABLE"),
    Column("SERVED"),
    Column("FORMAT", rank=1),
    Column("MIN VRAM", rank=2, right=True),
    Column("CONTEXT", rank=3, right=True),
    Column("RUNTIMES", rank=4, shortest=12),
    Column("OWNER", rank=5, shortest=8),
    Column("ID", rank=6),
)


def model_table(models: Iterable[ModelView]) -> Listing:
    """Answer models in the order of their names."""
    ordered = sorted(models, key=lambda model: (model.name, model.id))
    return Listing(MODEL_COLUMNS, [_row(model) for model in ordered])


def model_summary(models: Sequence[ModelView]) -> str:
    """Answer how many models there are, and how many of them can be had."""
    available, served = sum(model.available for model in models), sum(model.served for model in models)
    return f"{counted(len(models), 'model')}: {available} available, {served} served"


def model_facts(model: ModelView) -> list[RenderableType]:
    """Answer what the model is and what it needs."""
    metadata = model.metadata
    pairs = [
        ("name", model.name),
        ("id", model.id),
        ("owner", model.owner),
        ("format", or_unknown(metadata.get("format"))),
        ("min VRAM", _vram(metadata.get("minVramGb"))),
        ("context", number(metadata.get("contextLength"), "tokens")),
        ("runtimes", _runtimes(metadata)),
        ("aliases", listed(metadata.get("aliases"))),
        ("available", yes_or_no(model.available)),
        ("served", yes_or_no(model.served)),
    ]
    return [facts(pairs)]


def explanation(model: ModelView, availability: ModelAvailability, names: Mapping[str, str]) -> list[RenderableType]:
    """Answer why the model can or can't be had: node by node, every reason, each with what to do about it."""
    parts: list[RenderableType] = [sentence(f"\n{_verdict(model, availability)}", style="bold")]
    for node in availability.nodes:
        name = names.get(node.passport_id, node.passport_id)
        verdict = "could run it now" if node.eligible else "can't run it now"
        parts.append(sentence(f"  {name}: {verdict}"))
        parts += reason_lines(node.reasons)
    if availability.summary:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(availability.summary.items()))
        parts.append(sentence(f"Over all nodes, yours or not: {counts}."))
    return parts


def reason_lines(reasons: Iterable[ReasonView]) -> list[RenderableType]:
    """Answer each reason, and below it what to do about it."""
    lines: list[RenderableType] = []
    for reason in reasons:
        lines.append(sentence(f"    {reason.code}: {reason.message}", style="red"))
        if (what_to_do := remedy(reason.code)) is not None:
            lines.append(sentence(f"      {what_to_do}"))
    return lines


def _row(model: ModelView) -> tuple[str, ...]:
    metadata = model.metadata
    return (
        model.name,
        yes_or_no(model.available),
        yes_or_no(model.served),
        or_unknown(metadata.get("format")),
        _vram(metadata.get("minVramGb")),
        number(metadata.get("contextLength")),
        _runtimes(metadata),
        model.owner,
        model.id,
    )


def _verdict(model: ModelView, availability: ModelAvailability) -> str:
    if availability.served:
        return f"{model.name} can be had."
    if availability.available:
        return (
            f"{model.name} could run now, but no fresh, healthy node that fits it declares or reports it, so no "
            "request is sent. Load it on such a node, or declare it there."
        )
    if not availability.nodes and not availability.summary:
        return f"{model.name} can't be had: no node is registered. Register one: lucid agent run."
    return f"{model.name} can't be had: no node can run it now."


def _vram(minimum: Any) -> str:
    """Answer the least VRAM; of several quantizations the range."""
    if not isinstance(minimum, dict):
        return number(minimum, "GB") if isinstance(minimum, int | float) else UNKNOWN
    sizes = sorted(minimum.values())
    return number(sizes[0], "GB") if sizes[0] == sizes[-1] else f"{sizes[0]:g}-{sizes[-1]:g} GB"


def _runtimes(metadata: Mapping[str, Any]) -> str:
    recommended = metadata.get("runtimeRecommended")
    return listed(metadata.get("runtimes") or ([recommended] if recommended else []))
