"""`lucid keys`: create, list, edit, rotate and revoke API keys, for admins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import YesOption, confirm
from lucid_compute.cli.formatting import UNKNOWN, instant, or_unknown
from lucid_compute.cli.lookup import complete_key, complete_node, get_key, get_node, node_names
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_done, show_json, show_secret
from lucid_compute.cli.time_arguments import read_future
from lucid_compute.client.key_calls import KeyChanges
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.domain.key_limits import BudgetPeriod, KeyLimits
from lucid_compute.registry.keys.shapes import KeyView, NewKey

app = typer.Typer(
    cls=ListByDefault,
    help="Create, list, edit, rotate and revoke API keys; for admins.",
    epilog="`lucid keys` alone is `lucid keys list`, with the same options.",
)
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id or name.", autocompletion=complete_key)]
ExpiresOption = Annotated[
    datetime | None,
    typer.Option(parser=read_future, metavar="WHEN", help="An RFC 3339 instant, or a time such as 90d."),
]
BudgetOption = Annotated[
    str | None, typer.Option(metavar="USD/PERIOD", help="What it may spend, such as 20/month or 1.5/day.")
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL", help="A model that it may use, or a pattern: 'llama-*'; may be given again."),
]
LimitOption = Annotated[str | None, typer.Option(metavar="N|none", help="From 1 on; `none` removes the limit.")]
NONE, NEVER = "none", "never"
COLUMNS = (
    Column("NAME", shortest=20),
    Column("OWNER", shortest=8),
    Column("SCOPES", shortest=20),
    Column("KEY", rank=2),
    Column("LAST USED", rank=1),
    Column("EXPIRES", rank=3),
    Column("LIMITS", rank=4),
    Column("NODE", rank=5),
    Column("ID"),
)


@app.command("list")
def list_keys(
    owner: Annotated[str | None, typer.Option(help="This owner's keys.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List the keys that are not revoked, without their secrets."""
    with connected(api, key) as lucid:
        keys = list(lucid.keys.list(owner=owner))
        names = {} if as_json else node_names(lucid, (each.passport_id for each in keys))
    if as_json:
        show_json({"keys": keys})
    else:
        show(
            Listing(COLUMNS, [_row(each, names) for each in keys])
            if keys
            else sentence("No keys but those of the environment.")
        )


@app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    owner: Annotated[str, typer.Option(help="Whose it is; what it registers is theirs.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; may be given again.")],
    node: Annotated[
        str | None,
        typer.Option(metavar="NODE", help="Bind a compute key to this node: id or name.", autocompletion=complete_node),
    ] = None,
    expires: ExpiresOption = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Unlimited if unset.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Unlimited if unset.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once; unlimited if unset.")] = None,
    budget: BudgetOption = None,
    model: ModelsOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Create a key for an owner. Stdout is the key alone, for scripts. The key is shown only once."""
    limits = {
        "requestsPerMinute": requests_per_minute,
        "tokensPerMinute": tokens_per_minute,
        "concurrency": concurrency,
        **_read_budget(budget),
        "models": model or None,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    with connected(api, key) as lucid:
        passport_id = None if node is None else get_node(lucid, node).id
        created = lucid.keys.create(
            name=name,
            owner=owner,
            scopes=scope,
            passport_id=passport_id,
            expires_at=expires,
            limits=limits or None,
        )
    _show_key(created, as_json=as_json)


@app.command("edit")
def edit_key(
    key_id: KeyArgument,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN|never", help="An RFC 3339 instant, or a time such as 90d.")
    ] = None,
    requests_per_minute: LimitOption = None,
    tokens_per_minute: LimitOption = None,
    concurrency: LimitOption = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD/PERIOD|none", help="Such as 20/month or 1.5/day; `none` removes it.")
    ] = None,
    model: ModelsOption = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Let it use every model.")] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Change a key's name, expiry or limits. Its secret and the limits that are not given stay."""
    if model and any_model:
        raise typer.BadParameter("Give either --model or --any-model.", param_hint="--any-model")
    limits: dict[str, Any] = {
        **_read_change("requestsPerMinute", requests_per_minute),
        **_read_change("tokensPerMinute", tokens_per_minute),
        **_read_change("concurrency", concurrency),
        **_read_budget_change(budget),
        **({"models": model or None} if model or any_model else {}),
    }
    changes = _changes(name, expires, limits)
    with connected(api, key) as lucid:
        changed = lucid.keys.update(get_key(lucid, key_id).id, **changes)
        names = {} if as_json else node_names(lucid, [changed.passport_id])
    if as_json:
        show_json(changed)
    else:
        show(Listing(COLUMNS, [_row(changed, names)]))


@app.command("rotate")
def rotate_key(
    key_id: KeyArgument,
    now: Annotated[bool, typer.Option("--now", help="End the previous secret at once, not after 24 hours.")] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Give a key a new secret. The previous one stays valid for 24 hours, so that its users can change over."""
    with connected(api, key) as lucid:
        created = lucid.keys.rotate(get_key(lucid, key_id).id, now=now)
    _show_key(created, as_json=as_json)


@app.command("revoke")
def revoke_key(
    key_id: KeyArgument,
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Revoke a key at once; this is final."""
    with connected(api, key) as lucid:
        found = get_key(lucid, key_id)
        confirm(f"Revoke the key {found.name} ({found.id}) of {found.owner} for good?", is_agreed=yes)
        lucid.keys.revoke(found.id)
    show_done(f"The key {found.name} is revoked.", {"id": found.id, "revoked": True}, as_json=as_json)


def _changes(name: str | None, expires: str | None, limits: dict[str, Any]) -> KeyChanges:
    """Return what to change of a key; refuse nothing at all."""
    changes: KeyChanges = {}
    if name is not None:
        changes["name"] = name
    if expires is not None:
        changes["expires_at"] = None if expires == NEVER else read_future(expires)
    if limits:
        changes["limits"] = limits
    if not changes:
        raise typer.BadParameter("Say what to change, such as --requests-per-minute 600.")
    return changes


def _read_budget_change(text: str | None) -> dict[str, str | None]:
    return {"budgetUsd": None, "budgetPeriod": None} if text == NONE else {**_read_budget(text)}


def _read_change(limit: str, text: str | None) -> dict[str, int | None]:
    """Return the change of one limit as a patch has it; empty if it was not given."""
    if text is None:
        return {}
    if text == NONE:
        return {limit: None}
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no limit. Give a number from 1 on, or `{NONE}` for no limit.")
    return {limit: int(text)}


def _read_budget(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    amount, _, period = text.partition("/")
    if period not in {*BudgetPeriod}:
        raise typer.BadParameter("Say an amount a day or a month, such as 20/month.", param_hint="--budget")
    return {"budgetUsd": amount, "budgetPeriod": period}


def _show_key(created: NewKey, *, as_json: bool) -> None:
    remark = (
        "This is the only time that the key is shown. Keep it in a secret store; `lucid keys rotate` creates another."
    )
    show_secret(created.key, remark, created, as_json=as_json)


def _row(key: KeyView, names: Mapping[str, str]) -> tuple[str, ...]:
    return (
        key.name,
        key.owner,
        ", ".join(key.scopes),
        f"...{key.last_four}",
        instant(key.last_used_at),
        "never" if key.expires_at is None else instant(key.expires_at),
        ", ".join(_limits(key.limits)) if key.limits else UNKNOWN,
        or_unknown(names.get(key.passport_id or "", key.passport_id)),
        key.id,
    )


def _limits(limits: KeyLimits) -> Iterator[str]:
    if limits.requests_per_minute is not None:
        yield f"{limits.requests_per_minute}/min"
    if limits.tokens_per_minute is not None:
        yield f"{limits.tokens_per_minute} tokens/min"
    if limits.concurrency is not None:
        yield f"{limits.concurrency} at once"
    if limits.budget_usd is not None:
        yield f"${limits.budget_usd:f}/{limits.budget_period}"
    if limits.models is not None:
        yield f"models {' '.join(limits.models)}"
