"""`lucid serve`: its options override the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lucid_compute.cli.failures import ExitStatus, complain
from lucid_compute.cli.settings import unknown
from lucid_compute.server.serve import run_service
from lucid_compute.server.settings import Settings, SettingsNotUsable, read_settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the embedded Postgres and of admin.key.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve; each is a replica.")] = None,
) -> None:
    """Run the service until SIGTERM: on LUCID_DATABASE_URL when it is set, else on an embedded Postgres."""
    flags = {"host": host, "port": port, "data_dir": data_dir, "workers": workers}
    settings = _read_settings(**{name: value for name, value in flags.items() if value is not None})
    _warn_of_mistyped()
    raise typer.Exit(run_service(settings))


def _warn_of_mistyped() -> None:
    """Warn of variables that resemble a setting of any part. The other parts are imported only if it may be theirs."""
    prefix = Settings.model_config["env_prefix"]
    if unknown({f"{prefix}{name}".upper() for name in Settings.model_fields}):
        from lucid_compute.cli.settings_command import warn_of_mistyped  # noqa: PLC0415 - it imports every part

        warn_of_mistyped()


def _read_settings(**flags: Any) -> Settings:
    try:
        return read_settings(**flags)
    except SettingsNotUsable as error:
        for sentence in str(error).splitlines():
            complain(sentence)
        raise typer.Exit(ExitStatus.USAGE) from None
