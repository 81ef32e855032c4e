"""`lucid models` and `lucid match`: which models are available, why one is not, and where a request would go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.padding import Padding

from lucid_compute.agent.doctor.reason_fixes import fix_of
from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, KeyOption, connected, with_commands
from lucid_compute.cli.failures import ExitStatus
from lucid_compute.cli.formatting import UNKNOWN, counted, listed, number, or_unknown, share, yes_or_no
from lucid_compute.cli.lookup import complete_model
from lucid_compute.cli.output import Column, JsonOption, Listing, facts, sentence, show, show_json
from lucid_compute.gateway.shapes import MatchAnswer, RankedNode
from lucid_compute.registry.domain.passports import ModelFormat, PassportStatus
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.shapes import ModelAvailability, ModelView, ReasonView

app = typer.Typer(
    cls=ListByDefault,
    help="See which models are available, and why one is not.",
    epilog="`lucid models` alone is `lucid models list`, with the same options.",
)
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Id, name or alias.", autocompletion=complete_model)
]


@app.command("list")
def list_models(
    available: Annotated[
        bool | None, typer.Option("--available/--unavailable", help="Only those that a node can run now, or can't.")
    ] = None,
    model_format: Annotated[ModelFormat | None, typer.Option("--format", help="Only of this format.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Models that run on this runtime.")] = None,
    max_vram: Annotated[float | None, typer.Option(min=0, help="GB that suffice.")] = None,
    owner: Annotated[str | None, typer.Option(help="This owner's models.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; may be given again, all must be there.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the name or the description.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List models. Available: a fresh, healthy node fits it. Served: such a node has it, so requests can be sent."""
    with connected(api, key) as lucid:
        models = list(
            lucid.models.list(
                available=available, format=model_format, runtime=runtime, max_vram=max_vram, owner=owner, tags=tag,
                search=search,
            )
        )  # fmt: skip
    if as_json:
        show_json({"models": models})
    elif models:
        show(model_table(models), sentence(""), sentence(model_summary(models)))
    else:
        show(sentence("No models. `lucid passports create NAME --type model --set format=gguf` registers one."))


@app.command("show")
def show_model(model: ModelArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """Show one model and, for each node, every reason against it. The exit status is 1 if the model is not served."""
    with connected(api, key) as lucid:
        view = lucid.models.get(model)
        availability = lucid.models.availability(view.id)
    if as_json:
        show_json({"model": view, "availability": availability})
    else:
        show(*model_facts(view), *explanation(view, availability))
    if not availability.served:
        raise typer.Exit(ExitStatus.REFUSED)


def match(
    model: ModelArgument,
    region: Annotated[list[str] | None, typer.Option(help="Allow this region; may be given again.")] = None,
    max_price: Annotated[str | None, typer.Option(help="US dollars for 1,000 tokens at most.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="To the first byte, at most.")] = None,
    user: Annotated[str | None, typer.Option(help="The session, as `user` in a request.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show where a request would go, without sending it. The exit status is 1 if no node may get it."""
    wants = {"allow_regions": region, "max_price_per_1k_tokens": max_price, "max_latency_ms": max_latency_ms}
    policy = {name: value for name, value in wants.items() if value is not None}
    with connected(api, key) as lucid:
        answer = lucid.match(model, user=user, lucid=policy)
    if as_json:
        show_json(answer)
    else:
        show(*match_parts(answer))
    if answer.chosen is None:
        raise typer.Exit(ExitStatus.REFUSED)


MOST_GROUPS = 20  # of nodes with the same reasons, shown to a person; a fleet may have thousands
MOST_NAMES = 8
MOST_THAT_LEFT = 5
NodeReasons = tuple[str, Sequence[ReasonView]]  # a node's name, and the reasons against it
MODEL_COLUMNS = (
    Column("NAME", shortest=36),
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
    """Return a table of models: those that nobody can use first, then by name."""
    ordered = sorted(models, key=lambda model: (model.available, model.served, model.name, model.id))
    return Listing(MODEL_COLUMNS, [_row(model) for model in ordered])


def model_summary(models: Sequence[ModelView]) -> str:
    """Return how many models there are, and how many are available and served."""
    available, served = sum(model.available for model in models), sum(model.served for model in models)
    return f"{counted(len(models), 'model')}: {available} available, {served} served"


def model_facts(model: ModelView) -> list[RenderableType]:
    """Return what the model is and what it needs."""
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


def explanation(model: ModelView, availability: ModelAvailability) -> list[RenderableType]:
    """Return why the model is available or not: every reason of each node, and what to do about each."""
    reasons_by_node = [(node.name or node.passport_id, node.reasons) for node in availability.nodes]
    reasons_by_node.sort(key=lambda node_reason: (len(node_reason[1]), node_reason[0]))
    parts: list[RenderableType] = [sentence(""), sentence(_verdict(model, availability), style="bold")]
    parts += node_reasons(reasons_by_node)
    if availability.summary:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(availability.summary.items()))
        parts.append(sentence(f"Over all nodes, yours or not: {counts}."))
    return parts + what_to_do(reasons_by_node, availability.summary)


def node_reasons(reasons_by_node: Sequence[NodeReasons]) -> list[RenderableType]:
    """Return every reason against each node. Nodes with the same reasons share an entry; those that left a line."""
    staying = [node_reason for node_reason in reasons_by_node if not _is_gone(node_reason)]
    parts: list[RenderableType] = []
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, reasons in staying:
        alike.setdefault(tuple((reason.code, reason.message) for reason in reasons), []).append(name)
    for why, names in list(alike.items())[:MOST_GROUPS]:
        more = f" and {counted(len(names) - MOST_NAMES, 'node')} more" if len(names) > MOST_NAMES else ""
        parts.append(_indented(f"{', '.join(names[:MOST_NAMES])}{more}:{'' if why else ' yes'}", 2))
        parts += [_indented(f"{code}: {with_commands(message)}", 4, style="red") for code, message in why]
    if (left_out := sum(map(len, list(alike.values())[MOST_GROUPS:]))) > 0:
        parts.append(sentence(f"  and {counted(left_out, 'node')} more; --json has all."))
    left = [name for name, _ in filter(_is_gone, reasons_by_node)]
    if left:
        more = f" and {len(left) - MOST_THAT_LEFT} more" if len(left) > MOST_THAT_LEFT else ""
        parts.append(sentence(f"  Deregistered or revoked, nothing to do: {', '.join(left[:MOST_THAT_LEFT])}{more}."))
    return parts


def what_to_do(reasons_by_node: Sequence[NodeReasons], counts: Iterable[str]) -> list[RenderableType]:
    """Return what to do about each reason, once: the reasons of the listed nodes, else those that were counted."""
    listed_codes = {
        reason.code for node_reason in reasons_by_node if not _is_gone(node_reason) for reason in node_reason[1]
    }
    codes = listed_codes if reasons_by_node else set(counts) - {ReasonCode.DEREGISTERED}
    if not codes:
        return []
    known = [(code, fix_of(code, "NODE")) for code in sorted(codes)]
    return [sentence(""), sentence("What to do:", style="bold"), Padding(facts(known), (0, 0, 0, 2))]


def _is_gone(node_reason: NodeReasons) -> bool:
    ends = [(ReasonCode.DEREGISTERED, "deregistered"), (ReasonCode.PASSPORT_INACTIVE, PassportStatus.REVOKED)]
    return any((reason.code, reason.found) in ends for reason in node_reason[1])


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
        return f"{model.name} is served: requests for it can be sent."
    if availability.available:
        return (
            f"{model.name} could run now, but no fresh, healthy node that fits it declares or reports it, so no "
            "request is sent. Load it on such a node, or declare it there."
        )
    if _is_nobody_there(availability):
        return f"{model.name} is not available: no node is registered. Register one: lucid agent run."
    return f"{model.name} is not available: no node can run it now."


def _is_nobody_there(availability: ModelAvailability) -> bool:
    """Return whether there is no node, of any owner, except nodes that have left.

    The nodes of others are known only by the counts of their reasons.
    """
    reasons_by_node = [(node.name or node.passport_id, node.reasons) for node in availability.nodes]
    others = Counter(availability.summary) - Counter(
        reason.code for node_reason in reasons_by_node for reason in node_reason[1]
    )
    return all(map(_is_gone, reasons_by_node)) and others.keys() <= {ReasonCode.DEREGISTERED}


def _indented(text: str, columns: int, style: str = "") -> RenderableType:
    return Padding(sentence(text, style=style), (0, 0, 0, columns))


def _vram(minimum: Any) -> str:
    """Return the least VRAM; of several quantizations the range."""
    if not isinstance(minimum, dict):
        return number(minimum, "GB") if isinstance(minimum, int | float) else UNKNOWN
    sizes = sorted(minimum.values())
    return number(sizes[0], "GB") if sizes[0] == sizes[-1] else f"{sizes[0]:g}-{sizes[-1]:g} GB"


def _runtimes(metadata: Mapping[str, Any]) -> str:
    recommended = metadata.get("runtimeRecommended")
    return listed(metadata.get("runtimes") or ([recommended] if recommended else []))


RANK_COLUMNS = (
    Column("NODE", shortest=12),
    Column("WAIT", right=True),
    Column("FRESH"),
    Column("IN FLIGHT", rank=1, right=True),
    Column("QUEUE", rank=2, right=True),
    Column("LOAD", rank=2, right=True),
    Column("REGION", rank=3),
    Column("ID", rank=4),
)


def match_parts(answer: MatchAnswer) -> list[RenderableType]:
    """Return the ranking, and each other node with every reason against it."""
    parts: list[RenderableType] = []
    if answer.chosen is not None:
        by = "" if answer.served_by in (None, answer.model) else f", as {answer.served_by}"
        parts.append(sentence(f"A request for {answer.model} would go to {answer.chosen.name}{by}.", style="bold"))
        parts += [sentence(""), Listing(RANK_COLUMNS, map(_ranked, answer.shortlist))]
    else:
        parts.append(sentence(f"A request for {answer.model} would be refused: no node may be sent it.", style="bold"))
    rejected = [(node.name, node.reasons) for node in answer.rejected]
    if rejected:
        parts += [sentence(""), sentence("Left out:"), *node_reasons(rejected)]
    return parts + what_to_do(rejected, answer.rejections)


def _ranked(node: RankedNode) -> tuple[str, ...]:
    return (
        node.name,
        number(round(node.score, 1), "ms"),
        yes_or_no(node.fresh),
        number(node.in_flight),
        number(node.queue_depth),
        share(node.load),
        or_unknown(node.region),
        node.passport_id,
    )
