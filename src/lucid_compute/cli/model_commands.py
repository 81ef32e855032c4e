"""`lucid models`: what can be had, and why not."""

from __future__ import annotations

from typing import Annotated

import typer

from lucid_compute.cli.command_groups import ListsByDefault
from lucid_compute.cli.completion import complete_model
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.model_tables import explanation, model_facts, model_summary, model_table
from lucid_compute.cli.output import JsonOption, sentence, show, show_json
from lucid_compute.passports import ModelFormat

app = typer.Typer(
    cls=ListsByDefault,
    help="See which models can be had, and why one can't.",
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
    """Show one model and, node by node, every reason why it can't be had; the exit status is 1 if it is not served."""
    with connected(api, key) as lucid:
        view = lucid.models.get(model)
        availability = lucid.models.availability(view.id)
    if as_json:
        show_json({"model": view, "availability": availability})
    else:
        show(*model_facts(view), *explanation(view, availability))
    if not availability.served:
        raise typer.Exit(ExitStatus.REFUSED)
