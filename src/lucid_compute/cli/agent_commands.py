"""`lucid agent`: report a running inference server and its GPUs to the registry."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import RenderableType

from lucid_compute.agent.settings import AgentSettings
from lucid_compute.cli.command_groups import SuggestingGroup
from lucid_compute.cli.connection import ApiOption, KeyOption, service_and_key
from lucid_compute.cli.formatting import UNKNOWN, number, or_unknown, share
from lucid_compute.cli.output import Column, Listing, facts, sentence, show, show_json

app = typer.Typer(
    cls=SuggestingGroup, help="Report an inference server and its GPUs to the registry.", no_args_is_help=True
)


def _option(name: str, *flags: str) -> Any:
    """Return the option of a setting, with the setting's help and variable."""
    meaning = AgentSettings.model_fields[name].description
    words = {"price_per_1k_tokens": "USD", "drain_seconds": "SECONDS"}
    return typer.Option(*flags, metavar=words.get(name), help=f"{meaning} [LUCID_AGENT_{name.upper()}]")


Url = Annotated[str | None, _option("url")]
InferenceKey = Annotated[str | None, _option("inference_key")]
Gpus = Annotated[str | None, _option("gpus")]


@app.command()
def run(
    url: Url = None,
    api: ApiOption = None,
    key: KeyOption = None,
    public_url: Annotated[str | None, _option("public_url")] = None,
    outbound: Annotated[bool | None, _option("outbound", "--outbound")] = None,
    name: Annotated[str | None, _option("name")] = None,
    passport_id: Annotated[str | None, _option("passport_id")] = None,
    inference_key: InferenceKey = None,
    region: Annotated[str | None, _option("region")] = None,
    price_per_1k_tokens: Annotated[str | None, _option("price_per_1k_tokens", "--price-per-1k-tokens")] = None,
    max_concurrency: Annotated[int | None, _option("max_concurrency")] = None,
    vram: Annotated[str | None, _option("vram")] = None,
    gpu: Annotated[str | None, _option("gpu")] = None,
    gpus: Gpus = None,
    capabilities: Annotated[str | None, _option("capabilities")] = None,
    models: Annotated[str | None, _option("models")] = None,
    quantization: Annotated[str | None, _option("quantization")] = None,
    drain_seconds: Annotated[float | None, _option("drain_seconds")] = None,
    deregister_on_exit: Annotated[bool | None, _option("deregister_on_exit", "--deregister-on-exit")] = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="Log JSON, one object a line.")] = False,
) -> None:
    """Register this machine's inference server and report it until SIGTERM; then let its requests end.

    Exit status: 0 stopped as asked, 2 wrong settings, 4 the key is refused, 5 no such passport, 10 the node was
    deregistered elsewhere, 11 another agent took its place, 128 and more a second signal.
    """
    options = {name: value for name, value in locals().items() if name not in {"api", "key", "json_log"}}
    settings = _read_settings(options)
    from lucid_compute.agent.agent import run_agent  # noqa: PLC0415 - the other commands start without it

    _configure_log(as_json=json_log)
    raise typer.Exit(run_agent(settings, *service_and_key(api, key)))


@app.command()
def inspect(
    url: Url = None,
    inference_key: InferenceKey = None,
    gpus: Gpus = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print what an agent would find here, and report nothing. Exit status: 0 the server can serve, else 1."""
    settings = _read_settings({"url": url, "inference_key": inference_key, "gpus": gpus})
    from lucid_compute.agent.agent import dry_run  # noqa: PLC0415 - the other commands start without it

    logging.disable(logging.WARNING)  # the output has the same information
    found = dry_run(settings)
    if as_json:
        show_json(found)
    else:
        show(*_seen(found))
    raise typer.Exit(0 if found["fault"] is None else 1)


_MODEL_COLUMNS = (Column("MODEL"), Column("LOADED"), Column("CONTEXT", right=True), Column("QUANTIZATION", rank=1))
_GPU_COLUMNS = (
    Column("GPU", right=True),
    Column("NAME", rank=1, shortest=12),
    Column("BUSY", right=True),
    Column("MEMORY", right=True),
    Column("TEMPERATURE", rank=2, right=True),
    Column("POWER", rank=2, right=True),
)


def _seen(found: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield what an agent would report, for a person: the server, its models, its GPUs, what it would register."""
    fault, runtime = found["fault"], " ".join(filter(None, (found["runtime"], found["version"])))
    yield facts(
        (
            ("server", found["url"]),
            ("state", f"can't serve: {fault}" if fault else "can serve"),
            ("runtime", f"{runtime} ({found['confidence']})" if runtime else UNKNOWN),
            ("evidence", "; ".join(found["evidence"]) or UNKNOWN),
            ("load", share(found["load"])),
            ("in flight", number(found["in_flight"])),
            ("queue", number(found["queue_depth"])),
            ("tokens generated", number(found["tokens_generated"])),
        )
    )
    if found["models"]:
        yield sentence("")
        yield Listing(_MODEL_COLUMNS, [_model(model, found["loaded"]) for model in found["models"]])
    yield sentence("")
    if found["gpus"]:
        yield Listing(_GPU_COLUMNS, [_gpu(gpu) for gpu in found["gpus"]])
    else:
        yield sentence(f"No GPU was found. {found['nvml'] or ''}".rstrip())
    yield sentence("")
    yield sentence("An agent would register this:")
    yield facts((name, _in_words(value)) for name, value in found["metadata"].items() if value is not None)


def _model(model: dict[str, Any], loaded: list[str]) -> tuple[str, ...]:
    is_loaded = "yes" if model["id"] in loaded else "no"
    return model["id"], is_loaded, number(model["max_tokens"]), or_unknown(model["quantization"])


def _gpu(gpu: dict[str, Any]) -> tuple[str, ...]:
    used, total = gpu.get("memoryUsedMb"), gpu.get("memoryTotalMb")
    return (
        str(gpu["index"]),
        or_unknown(gpu.get("name")),
        share(gpu.get("utilization")),
        UNKNOWN if total is None else f"{number(used)} of {number(total)} MB",
        UNKNOWN if gpu.get("temperatureC") is None else f"{gpu['temperatureC']} C",
        UNKNOWN if gpu.get("powerW") is None else f"{gpu['powerW']} W",
    )


def _in_words(value: Any) -> str:
    """Return a value of the metadata as a person reads it: lists with commas, of runtimes name and version."""
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, dict):
        return " ".join(str(each) for each in value.values() if each is not None)
    return str(value)


def _read_settings(options: dict[str, Any]) -> AgentSettings:
    """Return the settings. A wrong one ends the command with a sentence and exit status 2."""
    try:
        return AgentSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            option = f"--{fault['loc'][0]}: ".replace("_", "-") if fault["loc"] else ""
            print(f"lucid: {option}{str(fault['msg']).removeprefix('Value error, ')}", file=sys.stderr)
        raise typer.Exit(2) from None


def _configure_log(*, as_json: bool) -> None:
    """Log our own messages, and the warnings and errors of libraries."""
    from lucid_compute.server.logging import configure_log  # noqa: PLC0415 - only here

    if as_json:
        configure_log("INFO")
        return
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, stream=sys.stderr, force=True)
    logging.getLogger("lucid_compute").setLevel(logging.INFO)
