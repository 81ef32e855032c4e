"""The outbox of webhooks: transactions that write events fill it, and every replica claims deliveries from it.

Only the oldest waiting delivery of one node to one webhook can be claimed, so deliveries arrive in order. A failed one
holds back the later ones of its node, and none of other nodes. A claim expires automatically: the deliveries of a
replica that was killed are sent again. So a receiver may get an event twice, with the same id.

Webhooks are looked at one by one, and what waits for one is bounded: so nobody's backlog delays another's deliveries.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
WEBHOOKS_A_LOOK = 8  # a transaction: if it fails, the other webhooks still have their turn
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
_WAITING = text(f"{WAITING_WEBHOOKS} SELECT id::text FROM waiting WHERE id IS NOT NULL")
# Of one webhook. `:enough` is as far as it is counted.
_COUNT = text("""
    SELECT counted.waiting, CASE WHEN w.failing_since IS NULL
        THEN extract(epoch FROM now() - d.occurred_at)::float8 ELSE 0 END
    FROM webhooks w CROSS JOIN LATERAL (
        SELECT count(*) AS waiting, min(position) AS oldest FROM (
            SELECT position FROM webhook_deliveries WHERE webhook_id = w.id AND state = 'waiting' LIMIT :enough
        ) few
    ) counted JOIN webhook_deliveries d ON d.position = counted.oldest
    WHERE w.id = :webhook_id
""")
_TROUBLED = text("""
    SELECT count(*) FILTER (WHERE disabled_at IS NULL), count(disabled_at)
    FROM webhooks WHERE failing_since IS NOT NULL OR disabled_at IS NOT NULL
""")
_TRY_LOCK = text(f"SELECT pg_try_advisory_xact_lock({OUTBOX_LOCK})")
# What is being sent stays. Only one replica at a time counts and gives up, or two would give up twice as many.
_GIVE_UP_OLDEST = text("""
    UPDATE webhook_deliveries SET state = 'given_up', ended_at = now(), claimed_until = NULL
    WHERE position = ANY(ARRAY(
        SELECT position FROM webhook_deliveries
        WHERE webhook_id = :webhook_id AND state = 'waiting' AND (claimed_until IS NULL OR claimed_until <= now())
        ORDER BY position LIMIT :excess FOR UPDATE SKIP LOCKED
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


class Waiting(NamedTuple):
    """How many deliveries wait for a webhook, and the age of the oldest; 0 if the webhook fails."""

    deliveries: int = 0
    oldest_seconds: float = 0.0


class Backlog(NamedTuple):
    """How many deliveries wait, the age of the oldest whose webhook is not failing, and how many webhooks fail.

    `oldest_seconds` shows whether sending keeps up. Failing webhooks are left out: `failing_since` tells about them.
    """

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

    async def waiting_webhooks(self) -> list[str]:
        """Return the ids of the webhooks for which anything waits.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            return [str(id_) for (id_,) in await connection.execute(_WAITING)]

    async def count_waiting(self, webhook_id: str, most: int) -> tuple[Waiting, int]:
        """Return what waits for a webhook, and how many deliveries were given up: the oldest of more than `most`.

        A few thousand are counted and given up in one call beyond `most`, so call it again when there are more.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        values = {"webhook_id": webhook_id, "enough": most + ROWS_A_STEP}
        async with self._database.transaction() as connection:
            row = (await connection.execute(_COUNT, values)).one_or_none()
        waiting = Waiting() if row is None else Waiting(*row)
        if waiting.deliveries <= most:
            return waiting, 0
        return waiting, await self._give_up_oldest(webhook_id, most)

    async def _give_up_oldest(self, webhook_id: str, most: int) -> int:
        """Give up the oldest of more than `most` deliveries. It counts anew, while no other replica gives up any."""
        async with self._database.transaction() as connection:
            if not await connection.scalar(_TRY_LOCK):
                return 0  # another replica is at it
            row = (
                await connection.execute(_COUNT, {"webhook_id": webhook_id, "enough": most + ROWS_A_STEP})
            ).one_or_none()
            excess = {"webhook_id": webhook_id, "excess": max(0, (0 if row is None else row[0]) - most)}
            subjects = [subject_id for (subject_id,) in await connection.execute(_GIVE_UP_OLDEST, excess)]
            distinct = [*set(subjects)]
            await connection.execute(WAKE, {"webhook_ids": [webhook_id] * len(distinct), "subject_ids": distinct})
        return len(subjects)

    async def count_backlog(self, waiting: Collection[Waiting]) -> Backlog:
        """Return how much waits for all replicas, as it was counted, and how many webhooks fail.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            failing, disabled = (await connection.execute(_TROUBLED)).one()
        oldest_seconds = max((each.oldest_seconds for each in waiting), default=0.0)
        return Backlog(sum(each.deliveries for each in waiting), oldest_seconds, failing, disabled)

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
