"""`lucid doctor`: find out why a node gets no requests."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import textwrap
from typing import Annotated, Any

import typer

from lucid_compute.cli.connection import ApiOption, KeyOption, service_and_key
from lucid_compute.cli.failures import CommandFailed, ExitStatus
from lucid_compute.cli.formatting import counted, plain
from lucid_compute.client import AsyncLucid
from lucid_compute.client.errors import ConfigurationFault

_MARKS = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skipped": "-"}
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "bright_black"}
_STATUS_OF = {
    "service": ExitStatus.UNREACHABLE,
    "key": ExitStatus.NOT_AUTHORISED,
    "scope": ExitStatus.NOT_AUTHORISED,
}
_TITLE_COLUMNS, _MARK_COLUMNS, _WIDEST = 16, 4, 120
_CALL_SECONDS = 10.0


def doctor(
    node: Annotated[
        str | None, typer.Argument(metavar="NODE", help="Id or name; the key's only node if left out.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="LUCID_AGENT_URL", help="The inference server, as this machine reaches it; as registered if unset."
        ),
    ] = None,
    inference_key: Annotated[
        str | None, typer.Option(envvar="LUCID_AGENT_INFERENCE_KEY", help="The inference server's own bearer key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Find out why a node gets no requests, and how to fix each fault.

    Exit status: 0 nothing failed, 1 a check failed, 2 wrong usage, 3 the service can't be reached, 4 not authorised.
    """
    try:
        status = asyncio.run(_examine(node, url, inference_key, api, key, as_json=as_json))
    except ConfigurationFault as error:
        raise CommandFailed(error.message, ExitStatus.USAGE) from error
    raise typer.Exit(status)


async def _examine(
    node: str | None, url: str | None, inference_key: str | None, api: str | None, key: str | None, *, as_json: bool
) -> int:
    from lucid_compute.agent.doctor.examination import examine  # noqa: PLC0415 - the other commands start without it

    checks: list[dict[str, Any]] = []
    base_url, known_key = service_and_key(api, key)
    async with AsyncLucid(base_url, known_key or "", timeout_seconds=_CALL_SECONDS) as lucid:
        async for check_id, title, finding in examine(lucid, node, url, inference_key):
            shown = {"id": check_id, "title": title, **finding._asdict()}
            checks.append(shown)
            if not as_json and finding.needs is None:
                _show(shown)
    status = _status_of(checks)
    if as_json:
        print(json.dumps({"api": base_url, "passed": status == 0, "checks": checks}, indent=2))
    else:
        _sum_up(checks)
    return status


def _status_of(checks: list[dict[str, Any]]) -> int:
    failures = [check["id"] for check in checks if check["verdict"] == "fail"]
    return _STATUS_OF.get(failures[0], ExitStatus.REFUSED) if failures else ExitStatus.OK


def _show(check: dict[str, Any]) -> None:
    """Print a check as one line, and its fix below it."""
    verdict = str(check["verdict"])
    mark = typer.style(f"{_MARKS[verdict]:>{_MARK_COLUMNS}}", fg=_COLOURS[verdict], bold=verdict == "fail")
    indent = " " * (_MARK_COLUMNS + _TITLE_COLUMNS + 4)
    lines = _wrap(check["found"], len(indent))
    typer.echo(f"{mark}  {check['title']:<{_TITLE_COLUMNS}}  " + f"\n{indent}".join(lines))
    if check["fix"] is not None:
        for line in _wrap(f"→ {check['fix']}", len(indent)):
            typer.echo(f"{indent}{typer.style(line, bold=True)}")


def _wrap(text: str, indent: int) -> list[str]:
    """Wrap the text for the terminal; a pipe gets one line. Control characters in foreign text are written out."""
    if not sys.stdout.isatty():
        return [plain(text)]
    room = max(min(shutil.get_terminal_size().columns, _WIDEST) - indent, 20)
    return textwrap.wrap(plain(text), room, break_long_words=False, break_on_hyphens=False) or [""]


def _sum_up(checks: list[dict[str, Any]]) -> None:
    verdicts = [check["verdict"] for check in checks]
    failures, warnings = verdicts.count("fail"), verdicts.count("warn")
    more = f", {counted(warnings, 'warning')}" if warnings else ""
    unasked = [check["title"] for check in checks if check["needs"] is not None]
    if unasked:
        typer.echo(f"{'-':>{_MARK_COLUMNS}}  {'Not asked':<{_TITLE_COLUMNS}}  {', '.join(unasked)}")
    if failures:
        typer.echo(f"\n{counted(failures, 'failure')}{more}. Begin with the first one: others may follow from it.")
    elif warnings:
        typer.echo(f"\nNothing failed; {counted(warnings, 'warning')}.")
    else:
        typer.echo("\nNothing keeps requests away from this node.")
