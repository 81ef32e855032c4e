"""The outbox of webhooks: transactions that write events fill it, and every replica claims deliveries from it.

Only the oldest waiting delivery of one node to one webhook can be claimed, so deliveries arrive in order. A failed one
holds back the later ones of its node, and none of other nodes. A claim expires automatically: the deliveries of a
replica that was killed are sent again. So a receiver may get an event twice, with the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import text

from lucid_compute.postgres.database import Database
from lucid_compute.webhooks.rules import RETRY_WINDOW
from lucid_compute.wire import write_instant

CLAIM_SECONDS = 30
CLAIMED_AT_A_TIME = 128  # of one webhook, by all replicas
RETENTION_DAYS = 7
ATTEMPTS_KEPT = 10
SECRETS = """ARRAY[w.secret] || CASE WHEN w.former_secret_until > now() THEN ARRAY[w.former_secret] ELSE '{}' END"""
# Claimed deliveries come first, so that they count towards the number that a webhook may have claimed. A failing
# webhook is tried with one delivery at a time, and all failing ones together have room for a few. Postgres evaluates
# the last conditions again on a row that another replica has claimed meanwhile.
_CLAIM = text(f"""
    WITH heads AS (
        SELECT DISTINCT ON (webhook_id, subject_id) position, webhook_id, next_attempt_at,
            coalesce(claimed_until > now(), false) AS is_claimed
        FROM webhook_deliveries WHERE state = 'waiting'
        ORDER BY webhook_id, subject_id, position
    ), placed AS (
        SELECT h.*, w.failing_since IS NOT NULL AS fails,
            row_number() OVER (
                PARTITION BY h.webhook_id ORDER BY h.is_claimed DESC, h.next_attempt_at, h.position
            ) AS place
        FROM heads h JOIN webhooks w ON w.id = h.webhook_id
        WHERE w.disabled_at IS NULL AND (h.is_claimed OR h.next_attempt_at <= now())
    ), due AS (
        SELECT position, fails, row_number() OVER (PARTITION BY fails ORDER BY place, next_attempt_at) AS turn
        FROM placed WHERE NOT is_claimed AND place <= CASE WHEN fails THEN 1 ELSE {CLAIMED_AT_A_TIME} END
    )
    UPDATE webhook_deliveries d
    SET claimed_until = now() + interval '{CLAIM_SECONDS} seconds', attempts = d.attempts + 1,
        first_attempt_at = coalesce(d.first_attempt_at, now())
    FROM webhooks w
    WHERE d.position IN (
            SELECT position FROM due
            WHERE turn <= CASE WHEN fails THEN CAST(:failing_room AS integer) ELSE CAST(:room AS integer) END
        )
        AND w.id = d.webhook_id
        AND d.state = 'waiting' AND d.next_attempt_at <= now() AND (d.claimed_until IS NULL OR d.claimed_until <= now())
    RETURNING d.position, d.attempts, d.event_id, d.subject_id, d.type, d.occurred_at, d.payload, d.last_attempts,
        w.id AS webhook_id, w.url, {SECRETS} AS secrets,
        w.failing_since IS NOT NULL AS is_failing
""")
_RELEASE = text("""
    UPDATE webhook_deliveries d
    SET claimed_until = NULL, attempts = d.attempts - 1,
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
_BACKLOG = text("""
    SELECT count(*) AS waiting,
        coalesce(extract(epoch FROM now() - min(d.occurred_at) FILTER (WHERE w.failing_since IS NULL)), 0)::float8
            AS oldest_seconds,
        (SELECT count(*) FROM webhooks WHERE failing_since IS NOT NULL AND disabled_at IS NULL) AS failing,
        (SELECT count(*) FROM webhooks WHERE disabled_at IS NOT NULL) AS disabled
    FROM webhook_deliveries d JOIN webhooks w ON w.id = d.webhook_id WHERE d.state = 'waiting'
""")
_FORGET = text("UPDATE webhooks SET former_secret = NULL WHERE former_secret_until <= now() AND former_secret > ''")
_CLEAN = text(f"DELETE FROM webhook_deliveries WHERE ended_at < now() - interval '{RETENTION_DAYS} days'")


class DeliveryResult(NamedTuple):
    """The outcome of an attempt: the class of the status, such as `2xx`, or why there is none, such as `timeout`."""

    is_delivered: bool
    result: str
    milliseconds: float


class Backlog(NamedTuple):
    """How many deliveries wait, the age of the oldest whose webhook is not failing, and how many webhooks fail."""

    waiting: int
    oldest_seconds: float
    failing: int
    disabled: int


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

    async def claim(self, room: int, failing_room: int) -> list[Delivery]:
        """Claim up to `room` due deliveries, and up to `failing_room` of failing webhooks, for 30 s.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            rows = await connection.execute(_CLAIM, {"room": room, "failing_room": failing_room})
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
            if is_disabled:
                await connection.execute(_GIVE_UP, {"webhook_id": delivery.webhook_id})
        return is_disabled

    async def count_backlog(self) -> Backlog:
        """Return how much waits for all replicas, and how many webhooks fail.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            return Backlog(*(await connection.execute(_BACKLOG)).one())

    async def clean(self) -> None:
        """Delete deliveries that ended a week ago, and previous secrets that have expired.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_CLEAN)
            await connection.execute(_FORGET)


def _plain(row: Any) -> dict[str, Any]:
    return {name: str(value) if name.endswith("_id") else value for name, value in row.items()}
