"""`lucid webhooks`: manage webhooks, which report events of nodes and models by POST."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import CommandFailed, YesOption, confirm
from lucid_compute.cli.formatting import UNKNOWN, instant, or_unknown
from lucid_compute.cli.lookup import complete_node, get_node, node_names
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_done, show_json, show_secret
from lucid_compute.registry.domain.event_types import WebhookEvent
from lucid_compute.webhooks.shapes import DeliveryView, NewWebhook, WebhookView

app = typer.Typer(
    cls=ListByDefault,
    help="Send events of nodes and models to a URL.",
    epilog="`lucid webhooks` alone is `lucid webhooks list`, with the same options.",
)
WebhookArgument = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id.")]
COLUMNS = (
    Column("URL", shortest=20),
    Column("STATUS"),
    Column("FAILING SINCE", rank=1),
    Column("EVENTS", rank=3, shortest=20),
    Column("OWNER", rank=4),
    Column("ID"),
)
DELIVERY_COLUMNS = (
    Column("TYPE"),
    Column("AT"),
    Column("STATE"),
    Column("ATTEMPTS", rank=2, right=True),
    Column("LAST RESULT"),
    Column("NEXT ATTEMPT", rank=1),
    Column("NODE OR MODEL", rank=3),
)


@app.command("list")
def list_webhooks(as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """List the webhooks that this key can see, without their secrets."""
    with connected(api, key) as lucid:
        webhooks = list(lucid.webhooks.list())
    if as_json:
        show_json({"webhooks": webhooks})
    else:
        show(Listing(COLUMNS, map(_row, webhooks)) if webhooks else sentence("No webhooks."))


@app.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="Where to POST to.")],
    event: Annotated[
        list[WebhookEvent] | None, typer.Option(help="An event to send; may be given again. Unset: all.")
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE", help="Only events of this node; may be given again.", autocompletion=complete_node
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Only events of this model; may be given again.")
    ] = None,
    all_owners: Annotated[
        bool, typer.Option("--all-owners", help="Events of every owner's nodes and models; for admins.")
    ] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Create a webhook. Stdout is its secret alone, for scripts. The secret is shown only once."""
    with connected(api, key) as lucid:
        passport_ids = [get_node(lucid, each).id for each in node or []]
        passport_ids += [lucid.models.get(each).id for each in model or []]
        created = lucid.webhooks.create(
            url, events=event or None, passport_ids=passport_ids or None, all_owners=all_owners
        )
    _show_secret(created, f"The webhook {created.id} is created.", as_json=as_json)


@app.command("rotate")
def rotate_webhook(
    webhook_id: WebhookArgument,
    now: Annotated[bool, typer.Option("--now", help="End the previous secret at once, not after 24 hours.")] = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Give a webhook a new secret. For 24 hours the previous one signs too. Stdout is the secret alone."""
    with connected(api, key) as lucid:
        created = lucid.webhooks.rotate(webhook_id, now=now)
    until = "does not sign any more" if now else "signs too for 24 hours"
    _show_secret(created, f"The previous secret of {created.id} {until}.", as_json=as_json)


@app.command("test")
def try_webhook(
    webhook_id: WebhookArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None
) -> None:
    """Send a test event now. A delivered test enables a disabled webhook again."""
    with connected(api, key) as lucid:
        tested = lucid.webhooks.test(webhook_id)
    if as_json:
        show_json(tested)
    elif tested.delivered:
        show(sentence(f"{tested.message} It took {tested.milliseconds:.0f} ms."))
    if not tested.delivered:
        raise CommandFailed(tested.message)


@app.command("deliveries")
def list_deliveries(
    webhook_id: WebhookArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None
) -> None:
    """List the deliveries of the last seven days, and the pending ones."""
    with connected(api, key) as lucid:
        deliveries = list(lucid.webhooks.deliveries(webhook_id))
        names = {} if as_json else node_names(lucid, (each.passport_id for each in deliveries))
    if as_json:
        show_json({"deliveries": deliveries})
    else:
        rows = [_delivery_row(each, names) for each in deliveries]
        show(Listing(DELIVERY_COLUMNS, rows) if deliveries else sentence("No deliveries yet, and none pending."))


@app.command("delete")
def delete_webhook(
    webhook_id: WebhookArgument,
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Delete a webhook. Its pending deliveries are not sent."""
    confirm(f"Delete the webhook {webhook_id}?", is_agreed=yes)
    with connected(api, key) as lucid:
        lucid.webhooks.delete(webhook_id)
    show_done(f"The webhook {webhook_id} is deleted.", {"id": webhook_id, "deleted": True}, as_json=as_json)


def _show_secret(created: NewWebhook, what: str, *, as_json: bool) -> None:
    remark = f"{what} This is the only time that its secret is shown: deliveries are signed with it."
    if created.notice:
        remark = f"{remark} {created.notice}"
    show_secret(created.secret, remark, created, as_json=as_json)


def _row(webhook: WebhookView) -> tuple[str, ...]:
    failing = UNKNOWN if webhook.failing_since is None else instant(webhook.failing_since)
    events = "all" if set(webhook.events) == set(WebhookEvent) else ", ".join(webhook.events)
    owner = "all" if webhook.all_owners else webhook.owner
    return webhook.url, webhook.status, failing, events, owner, webhook.id


def _delivery_row(delivery: DeliveryView, names: Mapping[str, str]) -> tuple[str, ...]:
    return (
        delivery.type,
        instant(delivery.occurred_at),
        delivery.state,
        str(delivery.attempts),
        delivery.last_attempts[0].result if delivery.last_attempts else UNKNOWN,
        UNKNOWN if delivery.next_attempt_at is None else instant(delivery.next_attempt_at),
        or_unknown(names.get(delivery.passport_id or "", delivery.passport_id)),
    )
