"""News of requests in flight: what a lease tells once a second, told at once where a node takes only so many requests.

Sent by a task and a connection of its own, heard by the feed's. A replica that is alone sends nothing.
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

# Postgres says when, as it does for leases: so the two can be told apart by age.
_NOTIFY = """
    SELECT pg_notify($1, json_build_object('replica', $2::text, 'at', clock_timestamp(), 'counts', $3::json)::text)
"""


class InFlightBroadcast:
    """Tells the other replicas, forty times a second at most, how many requests this one has running on which node."""

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
        """Tell for as long as this task runs. What could not be told is in the next lease."""
        try:
            while True:
                await self._fleet.replicas.has_changed.wait()
                if news := self._fleet.replicas.take_news(NODES_A_MESSAGE, self._has_limit):
                    await self._tell(news)
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            self._connection.terminate()

    def _has_limit(self, passport_id: str) -> bool:
        node = self._fleet.find_node(passport_id)
        return node is not None and node.state.passport.max_concurrency is not None

    async def _tell(self, news: dict[str, int]) -> None:
        try:
            counts = json.dumps(news, separators=(",", ":"))
            async with self._connection.within(TIMEOUT_SECONDS) as connection:
                await connection.execute(_NOTIFY, IN_FLIGHT_CHANNEL, self._replica_id, counts)
        except Exception as error:  # noqa: BLE001 - leases tell the same, a second later; the task goes on
            if not is_transient(error):
                _log.exception("news of requests in flight could not be told")
            await asyncio.sleep(self._reconnect_seconds)


def hear(replicas: Replicas, message: str) -> None:
    """Show `replicas` what another one told; a message that can't be read is left out."""
    try:
        told = json.loads(message)
        counts = {str(node): int(count) for node, count in told["counts"].items()}
        replicas.apply_news(told["replica"], datetime.fromisoformat(told["at"]), counts)
    except (AttributeError, KeyError, TypeError, ValueError):
        _log.warning("news of requests in flight could not be read and are left out")
