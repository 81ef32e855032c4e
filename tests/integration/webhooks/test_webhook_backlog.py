"""What waits for one webhook delays no other, and is bounded; a look at the outbox that fails shows."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database, connect
from lucid_compute.webhooks.claim_sql import CLAIM, DUE_WEBHOOKS, READ_AT_A_TIME
from lucid_compute.webhooks.delivery import Deliverer
from lucid_compute.webhooks.outbox import ROWS_A_STEP, WEBHOOKS_A_LOOK, Delivery, WebhookOutbox
from lucid_compute.webhooks.rules import WebhookLimits
from lucid_compute.webhooks.sender import WebhookSender
from tests.api import Adjust, Api
from tests.fault_node import FaultNode
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql
from tests.webhooks import QUICK, deliveries_of, find_webhook, make_webhook, with_limits

DEAD = "http://127.0.0.1:1025/"
MANY = 100_000
ROOMS = {"room": 512, "failing_room": 32}
# What this transaction read of the table and of its indexes so far.
READ = text("""
    SELECT sum(pg_stat_get_xact_tuples_returned(id) + pg_stat_get_xact_tuples_fetched(id))::bigint FROM (
        SELECT 'webhook_deliveries'::regclass AS id
        UNION ALL SELECT indexrelid FROM pg_index WHERE indrelid = 'webhook_deliveries'::regclass
    ) relations
""")


@pytest.fixture
def adjust() -> Adjust:
    """The replica's own sender sleeps: the tests look at the outbox themselves."""
    return with_limits(QUICK._replace(poll_seconds=3600.0))


async def pile_up(api: Api, webhook_id: str, count: int, *, subjects: int = 1, age: str = "1 hour") -> list[str]:
    """Let so many deliveries wait for a webhook, of these subjects in turn; return their ids."""
    ids = [str(uuid4()) for _ in range(subjects)]
    await run_sql(
        api,
        f"""
        INSERT INTO webhook_deliveries (webhook_id, event_id, subject_id, type, occurred_at, payload, next_attempt_at)
        SELECT $1::text::uuid, gen_random_uuid(), ($2::text[])[1 + number % $3]::uuid, 'node.drained', now(), '{{}}',
            now() - interval '{age}'
        FROM generate_series(0, $4 - 1) number
        """,
        webhook_id,
        ids,
        subjects,
        count,
    )
    return ids


async def make_attackers(api: Api, webhooks: int, waiting: int) -> None:
    """Let so many deliveries wait for each of so many webhooks of another owner."""
    made = f"""
        INSERT INTO webhooks (id, owner, url, secret, events)
        SELECT gen_random_uuid(), 'attacker', '{DEAD}', 's', '{{node.drained}}' FROM generate_series(1, {webhooks})
    """
    await run_sql(api, made)
    await run_sql(
        api,
        f"""
        INSERT INTO webhook_deliveries (webhook_id, event_id, subject_id, type, occurred_at, payload, next_attempt_at)
        SELECT id, gen_random_uuid(), gen_random_uuid(), 'node.drained', now(), '{{}}', now() - interval '1 day'
        FROM webhooks, generate_series(1, {waiting}) WHERE owner = 'attacker'
        """,
    )
    await run_sql(api, "ANALYZE webhook_deliveries")


async def rows_read(api: Api, statement: Any, values: dict[str, Any]) -> int:
    """Run a statement, roll it back, and return how many rows and entries of indexes it read."""
    async with api.replica.database.transaction() as connection:
        before = await connection.scalar(READ)
        await connection.execute(statement, values)
        count = int(await connection.scalar(READ) or 0) - int(before or 0)
        await connection.rollback()
        return count


async def test_a_claim_costs_the_same_whatever_waits_for_others(api: Api) -> None:
    """A look at one webhook reads what it read before; finding the due webhooks reads a few entries of each."""
    victim = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, victim, 3, subjects=3)
    values = {"webhook_ids": [victim], "is_failing": False, "room": ROOMS["room"]}
    alone = [await rows_read(api, CLAIM, values), await rows_read(api, DUE_WEBHOOKS, {})]
    await make_attackers(api, 50, MANY // 50)
    among = [await rows_read(api, CLAIM, values), await rows_read(api, DUE_WEBHOOKS, {})]
    assert among[0] <= alone[0] + 50  # Postgres may choose another index
    assert among[1] <= alone[1] + 50 * 4
    some = [row[0] for row in await run_sql(api, "SELECT id::text FROM webhooks WHERE owner = 'attacker' LIMIT 16")]
    assert await rows_read(api, CLAIM, {**values, "webhook_ids": some}) <= 16 * READ_AT_A_TIME * 6


@pytest.mark.parametrize("fails", [False, True])
async def test_every_webhook_has_its_turn_however_much_waits_for_others(api: Api, fails: bool) -> None:
    """Also when each look can claim the deliveries of a few of them alone; at once, when all others fail."""
    await make_attackers(api, 50, 200)
    if fails:
        await run_sql(api, "UPDATE webhooks SET failing_since = now()")
    victim = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, victim, 1, age="0 s")
    outbox, looks = WebhookOutbox(api.replica.database), 0
    while victim not in {delivery.webhook_id for delivery in await outbox.claim(**ROOMS)}:
        looks += 1
        assert looks <= (0 if fails else 51 // WEBHOOKS_A_LOOK)


async def test_failing_webhooks_have_their_turn_too(api: Api) -> None:
    """A look has room for few of them."""
    await make_attackers(api, 50, 2)
    await run_sql(api, "UPDATE webhooks SET failing_since = now()")
    outbox, seen = WebhookOutbox(api.replica.database), set[str]()
    for _ in range(50 // WEBHOOKS_A_LOOK + 1):
        claimed = await outbox.claim(512, WEBHOOKS_A_LOOK)
        assert len({delivery.webhook_id for delivery in claimed}) == len(claimed)
        seen |= {delivery.webhook_id for delivery in claimed}
    assert len(seen) == 50


async def test_what_waits_behind_a_delivery_is_claimed_as_soon_as_that_has_ended(api: Api) -> None:
    """However it ended; and not before, nor while it is tried again later."""
    webhook = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, webhook, 5)
    outbox = WebhookOutbox(api.replica.database)
    positions = [row[0] for row in await run_sql(api, "SELECT position FROM webhook_deliveries ORDER BY position")]

    async def comes(position: int) -> Delivery:
        (delivery,) = await outbox.claim(**ROOMS)
        assert delivery.position == position
        for _ in range(2):
            assert await outbox.claim(**ROOMS) == []
        return delivery

    await outbox.succeed([(await comes(positions[0]), "[]")])
    await outbox.release([await comes(positions[1])])
    second = await comes(positions[1])
    await outbox.fail(second, "[]", wait_seconds=600, reason="")
    assert await outbox.claim(**ROOMS) == []
    await run_sql(api, "UPDATE webhook_deliveries SET next_attempt_at = now() WHERE attempts > 0 AND state = 'waiting'")
    second = await comes(positions[1])
    await run_sql(api, "UPDATE webhook_deliveries SET first_attempt_at = now() - interval '2 days' WHERE attempts > 0")
    await outbox.fail(second, "[]", wait_seconds=600, reason="")  # given up, after a day
    await run_sql(api, "UPDATE webhooks SET failing_since = NULL")
    await comes(positions[2])
    await run_sql(
        api, "UPDATE webhook_deliveries SET claimed_until = now(), next_attempt_at = now() WHERE claimed_until > now()"
    )
    assert (await outbox.count_waiting(webhook, 2))[1] == 1  # too many wait
    await outbox.succeed([(await comes(positions[3]), "[]")])
    await comes(positions[4])


async def test_a_node_with_many_events_does_not_hide_those_of_another_one(api: Api) -> None:
    """A look reads a part of what waits; what waits behind another delivery is put aside."""
    webhook = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, webhook, 2 * READ_AT_A_TIME)
    (other,) = await pile_up(api, webhook, 1, age="1 minute")
    outbox, looks = WebhookOutbox(api.replica.database), 0
    while other not in {delivery.subject_id for delivery in await outbox.claim(**ROOMS)}:
        looks += 1
        assert looks <= 4


async def test_of_too_many_deliveries_the_oldest_are_given_up(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and counted; the newest arrive, in order."""
    async with FaultNode() as receiver:
        webhook = await make_webhook(api, receiver.url)
        await pile_up(api, webhook["id"], 150, subjects=2)
        ids = [row[0] for row in await run_sql(api, "SELECT event_id::text FROM webhook_deliveries ORDER BY position")]
        limits = QUICK._replace(max_waiting=60)
        sender = make_sender(api.replica.database, limits=limits)
        assert await sender._count() == 90
        assert sender.dropped == 90
        assert f"webhook {webhook['id']}: over 60 deliveries wait, and 90 of the oldest are given up" in caplog.text
        running = asyncio.create_task(sender.run())
        await receiver.until(lambda receiver: len(receiver.requests) == 60, seconds=30)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    came = [request.headers["lucid-event-id"] for request in receiver.requests]
    for first in range(2):
        assert [event for event in came if event in ids[first::2]] == ids[90 + first :: 2]
    states = [delivery["state"] for delivery in await deliveries_of(api, webhook["id"])]
    assert states[:90] == ["given_up"] * 90


async def test_a_look_that_fails_is_logged_and_counted_and_the_next_one_goes_on(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each time that it begins to fail."""
    async with FaultNode() as receiver:
        webhook = await make_webhook(api, receiver.url)
        await pile_up(api, webhook["id"], 1)
        sender = make_sender(Database(api.replica.database.url, timeout_seconds=0.2))
        locker = await connect(api.replica.database.url, application="lucid tests")
        async with locker.transaction():
            await locker.execute("LOCK TABLE webhook_deliveries IN ACCESS EXCLUSIVE MODE")
            running = asyncio.create_task(sender.run())

            async def has_failed() -> bool:
                return sender.failed_looks >= 2

            await eventually(has_failed, 30)
        await locker.close()
        await receiver.until(lambda receiver: len(receiver.requests) == 1, seconds=30)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    told = [record for record in caplog.records if "a look at the outbox of webhooks failed" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]


async def test_a_webhook_with_many_deliveries_is_deleted(api: Api) -> None:
    """In steps, each of them short."""
    webhook = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, webhook, 2 * ROWS_A_STEP, subjects=3)
    assert (await api.http.delete(f"/webhooks/{webhook}")).status_code == 204
    assert await run_sql(api, "SELECT FROM webhook_deliveries") == []
    assert (await api.http.delete(f"/webhooks/{webhook}")).status_code == 404
    trail = (await api.http.get("/audit", params={"targetId": webhook})).json()["events"]
    assert [event["action"] for event in trail] == ["webhook.delete", "webhook.create"]


async def test_old_deliveries_are_cleaned_in_steps(api: Api) -> None:
    """And nothing else is."""
    webhook = (await make_webhook(api, DEAD))["id"]
    await pile_up(api, webhook, ROWS_A_STEP + 2)
    await run_sql(api, "UPDATE webhook_deliveries SET state = 'delivered', ended_at = now() - interval '8 days'")
    await run_sql(api, "UPDATE webhook_deliveries SET ended_at = now() WHERE position = 1")
    outbox = WebhookOutbox(api.replica.database)
    assert [await outbox.clean() for _ in range(2)] == [True, False]
    assert [row[0] for row in await run_sql(api, "SELECT position FROM webhook_deliveries")] == [1]


async def test_more_than_a_step_is_given_up_in_several(api: Api) -> None:
    """And what waits for each webhook is counted, the age of what waits for a failing one left out."""
    one, other = (await make_webhook(api, DEAD))["id"], (await make_webhook(api, DEAD))["id"]
    await pile_up(api, one, 2 * ROWS_A_STEP + 7, subjects=2)
    await pile_up(api, other, 2)
    await run_sql(api, "UPDATE webhooks SET failing_since = now() WHERE id = $1::text::uuid", one)
    await run_sql(
        api,
        "UPDATE webhook_deliveries SET occurred_at = now() - CASE webhook_id WHEN $1::text::uuid THEN interval '1 day' "
        "ELSE interval '1 hour' END",
        one,
    )
    sender = make_sender(api.replica.database, limits=QUICK._replace(max_waiting=5))
    assert [await sender._count() for _ in range(4)] == [ROWS_A_STEP, ROWS_A_STEP, 2, 0]
    assert sender.backlog is not None
    assert (sender.backlog.waiting, sender.backlog.failing, sender.backlog.disabled) == (7, 1, 0)
    assert 3600 <= sender.backlog.oldest_seconds < 7200
    kept = await run_sql(api, "SELECT position FROM webhook_deliveries WHERE state = 'waiting' ORDER BY position")
    assert [row[0] for row in kept] == list(range(2 * ROWS_A_STEP + 3, 2 * ROWS_A_STEP + 10))


async def test_a_webhook_that_covers_nothing_says_so(api: Api) -> None:
    """As an admin's own one does; it is created anyway."""
    made = await make_webhook(api, DEAD, events=["node.drained"])
    assert made["notice"].startswith("It covers no node now, because 'admin' has none")
    assert "--all-owners" in made["notice"]
    assert (await make_webhook(api, DEAD, allOwners=True))["notice"] is None
    await api.register()
    assert (await make_webhook(api, DEAD))["notice"] is None
    assert (await make_webhook(api, DEAD, events=["model.available"]))["notice"].startswith("It covers no model now")
    assert "notice" not in await find_webhook(api, made["id"])


def make_sender(database: Database, limits: WebhookLimits = QUICK) -> WebhookSender:
    """Return a sender of its own on the database."""
    clock = DatabaseClock()
    deliverer = Deliverer(EgressPolicy(allow_loopback=True), clock, set())
    return WebhookSender(WebhookOutbox(database), deliverer, clock, limits)
