"""`lucid agent`: report a running inference server and its GPUs to the registry."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lucid_compute.agent.settings import AgentSettings
from lucid_compute.cli.command_groups import SuggestingGroup
from lucid_compute.cli.connection import ApiOption, KeyOption, service_and_key

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
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            unknown = "none" if name in {"fault", "nvml"} else "unknown"
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{name:>16}  {unknown if value is None else shown}")
    raise typer.Exit(0 if found["fault"] is None else 1)


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
