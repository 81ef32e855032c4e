"""`lucid passports`: register nodes, models and other things, and change what was registered."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import CommandFailed, ExitStatus, YesOption, confirm
from lucid_compute.cli.formatting import instant, listed, or_unknown
from lucid_compute.cli.lookup import complete_passport, get_passport
from lucid_compute.cli.metadata_options import MetadataOption, SetOption, read_metadata_options
from lucid_compute.cli.output import Column, JsonOption, Listing, facts, sentence, show, show_done, show_json
from lucid_compute.cli.passport_import import import_passports
from lucid_compute.client import Lucid
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.domain.passports import PassportStatus, PassportType
from lucid_compute.registry.shapes import PassportView

app = typer.Typer(
    cls=ListByDefault,
    help="Register nodes, models and other things, and change what was registered.",
    epilog="`lucid passports` alone is `lucid passports list`, with the same options.",
)
PassportArgument = Annotated[
    str, typer.Argument(metavar="PASSPORT", help="Id or name.", autocompletion=complete_passport)
]
DescriptionOption = Annotated[str | None, typer.Option(help="For people.")]
VersionOption = Annotated[str | None, typer.Option(help="Of the thing itself.")]
TagOption = Annotated[list[str] | None, typer.Option(help="A tag; may be given again.")]
COLUMNS = (
    Column("NAME", shortest=20),
    Column("TYPE"),
    Column("STATUS"),
    Column("OWNER", rank=1, shortest=8),
    Column("CREATED", rank=2),
    Column("TAGS", rank=3, shortest=8),
    Column("ID"),
)


app.command("import")(import_passports)


@app.command("list")
def list_passports(
    passport_type: Annotated[PassportType | None, typer.Option("--type", help="Only of this type.")] = None,
    owner: Annotated[str | None, typer.Option(help="Another owner's; for admins.")] = None,
    status: Annotated[PassportStatus | None, typer.Option(help="Only of this status.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; may be given again, all must be there.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the name or the description.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List passports, newest first, including the models of all owners."""
    with connected(api, key) as lucid:
        found = list(lucid.passports.list(type=passport_type, owner=owner, status=status, tags=tag, search=search))
        left = set() if as_json else _nodes_that_left(lucid, found)
    if as_json:
        show_json({"passports": found})
    else:
        rows = [_row(passport, has_left=passport.id in left) for passport in found]
        show(Listing(COLUMNS, rows) if found else sentence("No passports."))


@app.command("show")
def show_passport(
    passport: PassportArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None
) -> None:
    """Show one passport in full; secrets are never shown."""
    with connected(api, key) as lucid:
        _show(get_passport(lucid, passport), as_json=as_json)


@app.command("create")
def create_passport(
    name: Annotated[str, typer.Argument(help="Unique among its owner's passports of the type.")],
    passport_type: Annotated[PassportType, typer.Option("--type", help="What it is.")] = PassportType.COMPUTE,
    metadata: MetadataOption = None,
    settings: SetOption = None,
    description: DescriptionOption = None,
    version: VersionOption = None,
    tag: TagOption = None,
    owner: Annotated[str | None, typer.Option(help="Another owner than the key's; for admins.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Register a thing: lucid passports create my-node --set vram=80GB --set inferenceUrl=http://10.0.0.5:8000."""
    read = read_metadata_options(metadata, settings)
    with connected(api, key) as lucid:
        created = lucid.passports.create(
            name=name,
            type=passport_type,
            metadata=read or {},
            description=description,
            version=version,
            tags=tag,
            owner=owner,
        )
    _show(created, as_json=as_json)


@app.command("update")
def update_passport(
    passport: PassportArgument,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    status: Annotated[PassportStatus | None, typer.Option(help="`revoked` is final.")] = None,
    metadata: MetadataOption = None,
    settings: SetOption = None,
    description: DescriptionOption = None,
    version: VersionOption = None,
    tag: TagOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Change the named fields and leave the rest; --set KEY=null removes a key from the metadata."""
    read = read_metadata_options(metadata, settings)
    fields = {
        "name": name, "status": status, "metadata": read, "description": description, "version": version, "tags": tag
    }  # fmt: skip
    changes: Any = {field: value for field, value in fields.items() if value is not None}
    if not changes:
        raise CommandFailed("Say what to change. See: lucid passports update --help", ExitStatus.USAGE)
    with connected(api, key) as lucid:
        changed = lucid.passports.update(get_passport(lucid, passport).id, **changes)
    _show(changed, as_json=as_json)


@app.command("revoke")
def revoke_passport(
    passport: PassportArgument,
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Revoke a passport; this is final. A node must have no requests in flight. The passport stays readable."""
    with connected(api, key) as lucid:
        found = get_passport(lucid, passport)
        confirm(f"Revoke the {found.type} passport {found.name} ({found.id}) for good?", is_agreed=yes)
        lucid.passports.revoke(found.id)
    show_done(f"{found.name} is revoked.", {"id": found.id, "status": PassportStatus.REVOKED}, as_json=as_json)


def _show(passport: PassportView, *, as_json: bool) -> None:
    if as_json:
        show_json(passport)
        return
    pairs = [
        ("name", passport.name),
        ("id", passport.id),
        ("type", passport.type.value),
        ("status", passport.status.value),
        ("owner", passport.owner),
        ("description", or_unknown(passport.description)),
        ("version", or_unknown(passport.version)),
        ("tags", listed(passport.tags)),
        ("created", instant(passport.created_at)),
        ("updated", instant(passport.updated_at)),
    ]
    inside = [(f"  {name}", _written(value)) for name, value in passport.metadata.items()]
    show(facts([*pairs, ("metadata", "" if inside else "-"), *inside]))


def _nodes_that_left(lucid: Lucid, passports: list[PassportView]) -> set[str]:
    """Return the ids of deregistered nodes. Their passports stay active, which a person would not expect."""
    if not any(passport.type is PassportType.COMPUTE for passport in passports):
        return set()
    return {node.id for node in lucid.compute.list(status=NodeStatus.DEREGISTERED)}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row(passport: PassportView, *, has_left: bool) -> tuple[str, ...]:
    status = NodeStatus.DEREGISTERED if has_left and passport.status is PassportStatus.ACTIVE else passport.status
    return (
        passport.name,
        passport.type.value,
        status.value,
        passport.owner,
        instant(passport.created_at),
        listed(passport.tags),
        passport.id,
    )
