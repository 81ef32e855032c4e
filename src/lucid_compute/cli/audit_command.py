"""`lucid audit`: who changed what, when and from where, as a table, CSV or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, NamedTuple

import typer

from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import CommandFailed, ExitStatus, refuse_both
from lucid_compute.cli.formatting import UNKNOWN, instant, or_unknown
from lucid_compute.cli.history_commands import MOST_SHOWN, LimitOption, SinceOption
from lucid_compute.cli.lookup import complete_passport, node_names
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_json, write_csv
from lucid_compute.cli.time_arguments import read_past
from lucid_compute.client import Lucid
from lucid_compute.registry.domain.passports import PassportType
from lucid_compute.registry.keys.shapes import AuditView

COLUMNS = (
    Column("AT"),
    Column("ACTION"),
    Column("TARGET", shortest=16),
    Column("BY", shortest=8),
    Column("KEY", rank=2, shortest=12),
    Column("FROM", rank=3),
    Column("DETAILS", rank=1, shortest=12),
    Column("REQUEST", rank=4),
)
CSV_TITLES = ("at", "action", "targetType", "target", "targetId", "by", "key", "ip", "requestId", "details")


class AuditNames(NamedTuple):
    """Names for the ids in the trail: of nodes, models and keys."""

    targets: Mapping[str, str]
    keys: Mapping[str, str]

    def target(self, entry: AuditView) -> str:
        """Return the type of the entry's target, and its name or its id."""
        name = self.targets.get(entry.target_id) or self.keys.get(entry.target_id) or entry.target_id
        return f"{'node' if entry.target_type == PassportType.COMPUTE else entry.target_type} {name}"

    def key(self, entry: AuditView) -> str:
        """Return the name or the id of the key that acted."""
        return or_unknown(self.keys.get(entry.actor_key_id or "") or entry.actor_key_id)


def audit(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="A node, model or key: name or id.", autocompletion=complete_passport),
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action, such as key.revoke, or a group of them: key.")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="OWNER", help="Only what this owner, or the key ID, did.")] = None,
    since: SinceOption = None,
    until: Annotated[
        datetime | None, typer.Option(parser=read_past, metavar="WHEN", help="Only what was before this instant.")
    ] = None,
    limit: LimitOption = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List who changed what, when and from where, newest first; for admins."""
    refuse_both("--csv", as_csv, "--json", as_json)
    most = limit if limit is not None or as_json or as_csv else MOST_SHOWN
    with connected(api, key) as lucid:
        target_id = None if target is None else _target_id(lucid, target)
        entries = lucid.audit(target_id=target_id, action=action, actor=by, since=since, until=until)
        found = list(islice(entries, most))
        names = AuditNames({}, {}) if as_json else _names(lucid, found)
    if as_json:
        show_json({"events": found})
    elif as_csv:
        write_csv(CSV_TITLES, (_csv_line(entry, names) for entry in found))
    elif found:
        show(Listing(COLUMNS, [_row(entry, names) for entry in found]))
    else:
        show(sentence("Nothing of the kind is in the audit trail."))


def _target_id(lucid: Lucid, target: str) -> str:
    """Return the id of the passport or key with that name; a text that names none is taken as an id.

    Raises:
        CommandFailed: several have the name.
    """
    named = [(each.id, each.type.value) for each in lucid.passports.list(search=target) if each.name == target]
    named += [(each.id, "key") for each in lucid.keys.list() if each.name == target]
    if len(named) > 1:
        which = ", ".join(f"{each_id} ({kind})" for each_id, kind in named)
        raise CommandFailed(f"{len(named)} have the name {target!r}. Choose one by its id: {which}.", ExitStatus.USAGE)
    return named[0][0] if named else target


def _names(lucid: Lucid, found: list[AuditView]) -> AuditNames:
    passports = [entry.target_id for entry in found if entry.target_type in {*PassportType}]
    return AuditNames(node_names(lucid, passports), {key.id: key.name for key in lucid.keys.list()})


def _row(entry: AuditView, names: AuditNames) -> tuple[str, ...]:
    return (
        instant(entry.at),
        entry.action,
        names.target(entry),
        or_unknown(entry.actor_owner),
        names.key(entry),
        or_unknown(entry.ip),
        _pairs(entry.details),
        or_unknown(entry.request_id),
    )


def _csv_line(entry: AuditView, names: AuditNames) -> tuple[str, ...]:
    return (
        entry.at.isoformat(),
        entry.action,
        entry.target_type,
        names.target(entry).partition(" ")[2],
        entry.target_id,
        entry.actor_owner or "",
        names.keys.get(entry.actor_key_id or "") or entry.actor_key_id or "",
        entry.ip or "",
        entry.request_id or "",
        "" if not entry.details else _pairs(entry.details),
    )


def _pairs(details: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in details.items() if value is not None) or UNKNOWN
