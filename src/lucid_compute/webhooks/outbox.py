"""The outbox of webhooks: transactions that write events fill it, and every replica claims deliveries from it.

Only the oldest waiting delivery of one node to one webhook can be claimed, so deliveries arrive in order. A failed one
holds back the later ones of its node, and none of other nodes. A claim expires automatically: the deliveries of a
replica that was killed are sent again. So a receiver may get an event twice, with the same id.

Webhooks are looked at one by one, and what waits for one is bounded: so nobody's backlog delays another's deliveries.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import text

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import Database
from lucid_compute.webhooks.claim_sql import CLAIM, DUE_WEBHOOKS, WAITING_WEBHOOKS, WAKE
from lucid_compute.webhooks.rules import RETRY_WINDOW
from lucid_compute.wire import write_instant

RETENTION_DAYS = 7
ATTEMPTS_KEPT = 10
WEBHOOKS_A_LOOK = 16  # a transaction: if it fails, the other webhooks still have their turn
ROWS_A_STEP = 5000  # to delete or to give up: some 50 ms
OUTBOX_LOCK = 0x77656268  # an advisory lock of our own: "webh"
_RELEASE = text("""
    UPDATE webhook_deliveries d
    SET claimed_until = NULL, next_attempt_at = now(), attempts = d.attempts - 1,
        first_attempt_at = CASE WHEN d.attempts > 1 THEN d.first_attempt_at END
    FROM unnest(CAST(:positions AS bigint[]), CAST(:attempts AS integer[])) AS c (position, attempts)
    WHERE d.position = c.position AND d.attempts = c.attempts AND d.state = 'waiting'
""")
# Webhooks are locked in the order of their ids, or two replicas could wait for each other.
_SUCCEED = text("""
    WITH ended AS (
        UPDATE webhook_deliveries d
        SET state = 'delivered', ended_at = now(), claimed_until = NULL,
            last_attempts = CAST(b.last_attempts AS jsonb)
        FROM unnest(CAST(:positions AS bigint[]), CAST(:last_attempts AS text[])) AS b (position, last_attempts)
        WHERE d.position = b.position AND d.state = 'waiting'
        RETURNING d.webhook_id
    )
    UPDATE webhooks SET failing_since = NULL WHERE id IN (
        SELECT id FROM webhooks WHERE id IN (SELECT webhook_id FROM ended) AND failing_since IS NOT NULL
        ORDER BY id FOR UPDATE
    )
""")
_DAY_AGO = f"now() - interval '{RETRY_WINDOW.total_seconds():.0f} seconds'"
_FAIL = text(f"""
    WITH failed AS (
        UPDATE webhook_deliveries
        SET claimed_until = NULL, last_attempts = CAST(:last_attempts AS jsonb),
            next_attempt_at = now() + :wait_seconds * interval '1 second',
            state = CASE WHEN first_attempt_at <= {_DAY_AGO} THEN 'given_up' ELSE state END,
            ended_at = CASE WHEN first_attempt_at <= {_DAY_AGO} THEN now() END
        WHERE position = :position AND state = 'waiting' AND attempts = :attempts
        RETURNING webhook_id
    )
    UPDATE webhooks SET failing_since = coalesce(failing_since, now()),
        disabled_at = CASE WHEN failing_since <= {_DAY_AGO} THEN now() END,
        disabled_reason = CASE WHEN failing_since <= {_DAY_AGO} THEN CAST(:reason AS text) END
    WHERE id IN (SELECT webhook_id FROM failed) AND disabled_at IS NULL
    RETURNING disabled_at IS NOT NULL
""")
_GIVE_UP = text("""
    UPDATE webhook_deliveries SET state = 'given_up', ended_at = now(), claimed_until = NULL
    WHERE webhook_id = :webhook_id AND state = 'waiting'
""")
# `oldest_seconds` shows whether sending keeps up. Failing webhooks are left out: `failing_since` tells about them.
_COUNT = text(f"""
    {WAITING_WEBHOOKS}
    SELECT w.id::text, counted.waiting, CASE WHEN w.failing_since IS NULL
        THEN extract(epoch FROM now() - d.occurred_at)::float8 ELSE 0 END AS oldest_seconds
    FROM waiting JOIN webhooks w USING (id) CROSS JOIN LATERAL (
        SELECT count(*) AS waiting, min(position) AS oldest FROM webhook_deliveries
        WHERE webhook_id = w.id AND state = 'waiting'
    ) counted JOIN webhook_deliveries d ON d.position = counted.oldest
""")
_TROUBLED = text("""
    SELECT count(*) FILTER (WHERE disabled_at IS NULL), count(disabled_at)
    FROM webhooks WHERE failing_since IS NOT NULL OR disabled_at IS NOT NULL
""")
_TRY_LOCK = text(f"SELECT pg_try_advisory_xact_lock({OUTBOX_LOCK})")
# What is being sent stays. Only one replica at a time counts and gives up, or two would give up twice as many.
_GIVE_UP_OLDEST = text(f"""
    UPDATE webhook_deliveries SET state = 'given_up', ended_at = now(), claimed_until = NULL
    WHERE position = ANY(ARRAY(
        SELECT position FROM webhook_deliveries
        WHERE webhook_id = :webhook_id AND state = 'waiting' AND (claimed_until IS NULL OR claimed_until <= now())
        ORDER BY position LIMIT least({ROWS_A_STEP}, greatest(0, (
            SELECT count(*) FROM webhook_deliveries WHERE webhook_id = :webhook_id AND state = 'waiting'
        ) - :most)) FOR UPDATE SKIP LOCKED
    ))
    RETURNING subject_id::text
""")
_FORGET = text("""
    UPDATE webhooks SET former_secret = CASE WHEN former_secret_until > now() THEN former_secret END,
        older_secrets = coalesce((
            SELECT jsonb_agg(older) FROM jsonb_array_elements(older_secrets) older
            WHERE (older->>'until')::timestamptz > now()
        ), '[]')
    WHERE former_secret_until <= now() AND former_secret > '' OR EXISTS (
        SELECT FROM jsonb_array_elements(older_secrets) older WHERE (older->>'until')::timestamptz <= now()
    )
""")
_CLEAN = text(f"""
    DELETE FROM webhook_deliveries WHERE position = ANY(ARRAY(
        SELECT position FROM webhook_deliveries WHERE ended_at < now() - interval '{RETENTION_DAYS} days'
        ORDER BY ended_at LIMIT {ROWS_A_STEP} FOR UPDATE SKIP LOCKED
    ))
""")


class DeliveryResult(NamedTuple):
    """The outcome of an attempt: the class of the status, such as `2xx`, or why there is none, such as `timeout`."""

    is_delivered: bool
    result: str
    milliseconds: float


class Backlog(NamedTuple):
    """How many deliveries wait, the age of the oldest whose webhook is not failing, and how many webhooks fail.

    `by_webhook` is how many wait for each webhook that has any.
    """

    waiting: int
    oldest_seconds: float
    failing: int
    disabled: int
    by_webhook: dict[str, int]


class Delivery(NamedTuple):
    """A delivery that this replica has claimed, and its webhook."""

    position: int
    attempts: int
    event_id: str
    subject_id: str
    type: str
    occurred_at: datetime
    payload: dict[str, Any]
    last_attempts: list[dict[str, Any]]
    webhook_id: str
    url: str
    secrets: list[str]
    is_failing: bool  # of the webhook, when it was claimed

    @property
    def event(self) -> dict[str, Any]:
        """The body of the delivery, the same in each attempt."""
        return {
            "id": self.event_id,
            "type": self.type,
            "occurredAt": write_instant(self.occurred_at),
            "passportId": self.subject_id,
            **{key: self.payload.get(key) for key in ("owner", "name", "reason", "details")},
        }


def with_attempt(earlier: list[dict[str, Any]], result: DeliveryResult, now: datetime) -> list[dict[str, Any]]:
    """Return the last ten attempts, newest first: this one and earlier ones."""
    attempt = {"at": write_instant(now), "result": result.result, "milliseconds": result.milliseconds}
    return [attempt, *earlier][:ATTEMPTS_KEPT]


class WebhookOutbox:
    """Claims deliveries for one replica, and records their outcomes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # By whether they fail, the last webhook that was looked at: the next look begins behind it.
        self._looked_until = {False: "", True: ""}

    async def claim(self, room: int, failing_room: int) -> list[Delivery]:
        """Claim up to `room` due deliveries, and up to `failing_room` of failing webhooks, for 30 s.

        Webhooks have their turn one after the other, a few in each transaction.

        Raises:
            DatabaseUnavailable: the database can't be reached, or these few took too long; the next call begins with
                others.
        """
        async with self._database.transaction() as connection:
            due = [(str(id_), fails) for id_, fails in await connection.execute(DUE_WEBHOOKS)]
        claimed: list[Delivery] = []
        for is_failing, most in ((False, room), (True, failing_room)):
            its = [id_ for id_, fails in due if fails is is_failing]
            await self._claim_in_turn(its, claimed, is_failing=is_failing, most=most)
        return claimed

    async def _claim_in_turn(self, due: list[str], claimed: list[Delivery], *, is_failing: bool, most: int) -> None:
        """Claim up to `most` deliveries of these webhooks, those behind the last look first, and add them."""
        behind = sorted(due, key=lambda id_: (id_ <= self._looked_until[is_failing], id_))
        most += len(claimed)
        for start in range(0, len(behind), WEBHOOKS_A_LOOK):
            if len(claimed) >= most:
                return
            some = behind[start : start + WEBHOOKS_A_LOOK]
            self._looked_until[is_failing] = some[-1]
            room = most - len(claimed)
            try:
                claimed += await self._claim_of(some, is_failing=is_failing, room=room)
            except DatabaseUnavailable:
                if not claimed:
                    raise
                return  # these few have their turn again, and then it shows

    async def _claim_of(self, webhook_ids: list[str], *, is_failing: bool, room: int) -> list[Delivery]:
        values = {"webhook_ids": webhook_ids, "is_failing": is_failing, "room": room}
        async with self._database.transaction() as connection:
            rows = await connection.execute(CLAIM, values)
            return [Delivery(**_plain(row)) for row in rows.mappings()]

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Release claimed deliveries that were never started, so that any replica can claim them.

        Raises:
            DatabaseUnavailable: the database can't be reached; the claims then expire.
        """
        values = {
            "positions": [each.position for each in deliveries],
            "attempts": [each.attempts for each in deliveries],
        }
        async with self._database.transaction() as connection:
            await connection.execute(_RELEASE, values)

    async def succeed(self, delivered: Sequence[tuple[Delivery, str]]) -> None:
        """Record deliveries that their receivers have accepted, each with its last attempts.

        Raises:
            DatabaseUnavailable: the database can't be reached; the events are then sent again.
        """
        values = {
            "positions": [delivery.position for delivery, _ in delivered],
            "last_attempts": [last_attempts for _, last_attempts in delivered],
        }
        async with self._database.transaction() as connection:
            await connection.execute(_SUCCEED, values)
            await connection.execute(WAKE, _subjects([delivery for delivery, _ in delivered]))

    async def fail(self, delivery: Delivery, last_attempts: str, *, wait_seconds: float, reason: str) -> bool:
        """Postpone a delivery, or give it up after a day. Return whether this disabled its webhook, with `reason`.

        A webhook is disabled when nothing was delivered for a day. All its waiting deliveries are then given up.

        Raises:
            DatabaseUnavailable: the database can't be reached; the event is then sent again.
        """
        values = {
            "position": delivery.position,
            "attempts": delivery.attempts,
            "last_attempts": last_attempts,
            "wait_seconds": wait_seconds,
            "reason": reason,
        }
        async with self._database.transaction() as connection:
            is_disabled = bool(await connection.scalar(_FAIL, values))
            await connection.execute(WAKE, _subjects([delivery]))  # if it was given up
            if is_disabled:
                await connection.execute(_GIVE_UP, {"webhook_id": delivery.webhook_id})
        return is_disabled

    async def count_backlog(self) -> Backlog:
        """Return how much waits for all replicas, and how many webhooks fail.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            rows = [(str(id_), waiting, age) for id_, waiting, age in await connection.execute(_COUNT)]
            failing, disabled = (await connection.execute(_TROUBLED)).one()
        return Backlog(
            waiting=sum(waiting for _, waiting, _ in rows),
            oldest_seconds=max((age for *_, age in rows), default=0.0),
            failing=failing,
            disabled=disabled,
            by_webhook={id_: waiting for id_, waiting, _ in rows},
        )

    async def give_up_oldest(self, webhook_id: str, most: int) -> int:
        """Give up the oldest of more than `most` waiting deliveries, a few thousand at most; return how many.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            if not await connection.scalar(_TRY_LOCK):
                return 0  # another replica is at it
            rows = await connection.execute(_GIVE_UP_OLDEST, {"webhook_id": webhook_id, "most": most})
            subjects = [subject_id for (subject_id,) in rows]
            distinct = [*set(subjects)]
            await connection.execute(WAKE, {"webhook_ids": [webhook_id] * len(distinct), "subject_ids": distinct})
        return len(subjects)

    async def clean(self) -> bool:
        """Delete some deliveries that ended a week ago, and previous secrets that have expired.

        Return whether there may be more to delete.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            deleted = await connection.execute(_CLEAN)
            await connection.execute(_FORGET)
            return deleted.rowcount == ROWS_A_STEP


def _subjects(deliveries: Sequence[Delivery]) -> dict[str, list[str]]:
    return {
        "webhook_ids": [each.webhook_id for each in deliveries],
        "subject_ids": [each.subject_id for each in deliveries],
    }


def _plain(row: Any) -> dict[str, Any]:
    return {name: str(value) if name.endswith("_id") else value for name, value in row.items()}
