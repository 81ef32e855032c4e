"""Records when models become available or unavailable, and enqueues the webhooks' events for it.

The sweep calls the matching engine for each model. Short and frequent changes are damped, as those of nodes are. No
other part reads these states: `/models` calls the matching engine itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.registry.cleaning import Rule
from lucid_compute.registry.domain.event_types import WebhookEvent
from lucid_compute.registry.domain.passports import ModelFormat
from lucid_compute.registry.events import ENQUEUE
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.variants import is_available
from lucid_compute.web.turns import in_batches

SETTLE_TIME = timedelta(seconds=5)
"""A change is recorded when it has lasted this long."""

OUTAGE_GRACE = timedelta(seconds=60)
"""For this long after an outage of the registry no model becomes unavailable: nodes have to send heartbeats first."""

MAX_RECENT_CHANGES = 3  # of a model in ten minutes; a further change to unavailable waits
MODELS_LOCK = 0x6D6F6465  # an advisory lock of our own: "mode"
_MODELS_A_TURN = 1000

_LAST = text("""
    SELECT m.id::text, held.is_available, (
        SELECT count(*) FROM model_states s
        WHERE s.model_id = m.id AND s.since > now() - interval '10 minutes' AND NOT s.is_first
    )
    FROM unnest(CAST(:ids AS uuid[])) AS m (id)
    JOIN LATERAL (
        SELECT is_available FROM model_states s WHERE s.model_id = m.id ORDER BY since DESC LIMIT 1
    ) held ON true
""")

_RECORD = text(f"""
    WITH recorded AS (
        INSERT INTO model_states (model_id, since, is_available, is_first)
        SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:since AS timestamptz[]), CAST(:available AS boolean[]),
                             CAST(:first AS boolean[]))
        ON CONFLICT DO NOTHING
        RETURNING model_id, since, is_available, is_first
    ), told AS (
        SELECT model_id AS subject_id, since AS at, NULL AS reason, CAST('{{}}' AS jsonb) AS details, CASE
            WHEN is_first THEN NULL
            WHEN is_available THEN '{WebhookEvent.MODEL_AVAILABLE}'
            ELSE '{WebhookEvent.MODEL_UNAVAILABLE}'
        END AS type
        FROM recorded
    )
    {ENQUEUE}
""")

# The newest row of each model is kept, however old it is.
OLD_MODEL_STATES = Rule(
    "model_states",
    "since < now() - interval '90 days' AND EXISTS ("
    "SELECT FROM model_states n WHERE n.model_id = model_states.model_id AND n.since > model_states.since)",
    "since",
)


class ModelChange(NamedTuple):
    """A change of a model's availability that is not recorded yet."""

    model_id: str
    is_available: bool
    since: datetime


class ModelStateRecorder:
    """Records changes of models' availability, as one replica sees the fleet. The sweep calls it."""

    def __init__(self, database: Database, fleet: Fleet) -> None:
        self._database = database
        self._fleet = fleet
        self._written: dict[str, bool] = {}
        self._seen: dict[str, ModelChange] = {}

    async def refresh(self) -> None:
        """Forget what was read: other replicas write too, and models are deleted."""
        known = {model.id for model in self._fleet.models_newest_first()}
        self._written.clear()
        self._seen = {model_id: seen for model_id, seen in self._seen.items() if model_id in known}

    async def follow(self, now: datetime, *, is_doubtful: bool) -> None:
        """Record every change that has lasted, with its event. While `is_doubtful` no model becomes unavailable.

        Raises:
            DatabaseUnavailable: the database can't be reached; the next call records what this one did not.
        """
        changes = await self.find_changes(now)
        if is_doubtful := is_doubtful or self._had_recent_outage(now):
            changes = [change for change in changes if change.is_available or not self._written.get(change.model_id)]
        async for batch in in_batches(changes, _MODELS_A_TURN):
            await self._record(batch, is_doubtful=is_doubtful)

    async def find_changes(self, now: datetime) -> list[ModelChange]:
        """Return the changes that are due: first seen in an earlier call, and settled now."""
        due = []
        models = [model for model in self._fleet.models_newest_first() if model.format is not ModelFormat.API]
        async for batch in in_batches(models, _MODELS_A_TURN):
            for model in batch:
                if self._fleet.find_model(model.id) is None:
                    continue
                is_now = is_available(self._fleet, model, now)
                if self._written.get(model.id) is is_now:
                    self._seen.pop(model.id, None)
                    continue
                seen = self._seen.get(model.id)
                if seen is None or seen.is_available is not is_now:
                    seen = self._seen[model.id] = ModelChange(model.id, is_now, now)
                if now - seen.since >= SETTLE_TIME:
                    due.append(seen)
        return due

    def _had_recent_outage(self, now: datetime) -> bool:
        outages = self._fleet.outages_until(now)
        return bool(outages) and now - outages[-1].ended_at < OUTAGE_GRACE

    async def _record(self, changes: Sequence[ModelChange], *, is_doubtful: bool) -> None:
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({MODELS_LOCK})")):
                return  # another replica records them; this one reads them next time
            rows = await connection.execute(_LAST, {"ids": [change.model_id for change in changes]})
            last = {model_id: (is_available, recent) for model_id, is_available, recent in rows}
            due = [change for change in changes if _is_due(change, *last.get(change.model_id, (None, 0)))]
            if is_doubtful:  # a model's first state is recorded anyway
                due = [change for change in due if change.is_available or change.model_id not in last]
            if due:
                await _insert(connection, due, set(last))
        self._written |= {model_id: is_available for model_id, (is_available, _) in last.items()}
        for change in due:
            self._written[change.model_id] = change.is_available
            self._seen.pop(change.model_id, None)


def _is_due(change: ModelChange, was_available: bool | None, recent_changes: int) -> bool:
    """Return whether to record a change now. A change to available never waits."""
    return was_available is None or (
        was_available is not change.is_available and (change.is_available or recent_changes < MAX_RECENT_CHANGES)
    )


async def _insert(connection: AsyncConnection, changes: list[ModelChange], known: set[str]) -> None:
    values = {
        "ids": [change.model_id for change in changes],
        "since": [change.since for change in changes],
        "available": [change.is_available for change in changes],
        "first": [change.model_id not in known for change in changes],
    }
    await connection.execute(_RECORD, values)
