"""Broadcast of in-flight counts to other replicas, for nodes with a limit of concurrent requests.

Leases carry the same counts once a second, which is too late for a limit. A task with a dedicated connection publishes
with NOTIFY, and the change feed's connection receives. A replica that is alone publishes nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime

from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.replicas import Replicas

IN_FLIGHT_CHANNEL = "lucid_in_flight"
INTERVAL_SECONDS = 0.025
NODES_A_MESSAGE = 140  # of 36 characters each, with counts of up to nine: below the 8000 bytes of a notification
TIMEOUT_SECONDS = 2.0
RECONNECT_SECONDS = 1.0

_log = logging.getLogger(__name__)

# The instant is Postgres's, as in leases, so that the newer of the two can be found.
_NOTIFY = """
    SELECT pg_notify($1, json_build_object('replica', $2::text, 'at', clock_timestamp(), 'counts', $3::json)::text)
"""


class InFlightBroadcast:
    """Publishes this replica's requests in flight per node to the other replicas, at most forty times a second."""

    def __init__(
        self,
        connection: DedicatedConnection,
        fleet: Fleet,
        *,
        replica_id: str,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> None:
        self._connection = connection
        self._fleet = fleet
        self._replica_id = replica_id
        self._reconnect_seconds = reconnect_seconds

    async def run(self) -> None:
        """Publish until this task is cancelled. What could not be published is in the next lease."""
        try:
            while True:
                await self._fleet.replicas.has_changed.wait()
                if counts := self._fleet.replicas.pop_changed_counts(NODES_A_MESSAGE, self._has_limit):
                    await self._publish(counts)
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            self._connection.terminate()

    def _has_limit(self, passport_id: str) -> bool:
        node = self._fleet.find_node(passport_id)
        return node is not None and node.state.passport.max_concurrency is not None

    async def _publish(self, counts: dict[str, int]) -> None:
        try:
            text = json.dumps(counts, separators=(",", ":"))
            async with self._connection.within(TIMEOUT_SECONDS) as connection:
                await connection.execute(_NOTIFY, IN_FLIGHT_CHANNEL, self._replica_id, text)
        except Exception as error:  # noqa: BLE001 - the next lease has the same counts; the task goes on
            if not is_transient(error):
                _log.exception("in-flight counts could not be published")
            await asyncio.sleep(self._reconnect_seconds)


def receive(replicas: Replicas, message: str) -> None:
    """Apply a message of another replica to `replicas`; one that can't be read is logged and left out."""
    try:
        body = json.loads(message)
        counts = {str(node): int(count) for node, count in body["counts"].items()}
        replicas.apply_counts(body["replica"], datetime.fromisoformat(body["at"]), counts)
    except (AttributeError, KeyError, TypeError, ValueError):
        _log.warning("in-flight counts could not be read and are left out")
