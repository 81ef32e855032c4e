"""Which connections of agents may stay: the rules of keys, passports and `bootId`, at their start and all along."""

from __future__ import annotations

import asyncio
import logging

from lucid_compute.errors import InvalidRequest
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.tunnel.tunnels import TunnelGrant, Tunnels

INSPECT_EVERY_SECONDS = 0.5
_FORMER_BOOT = "Another agent, started later, reports for this node."

_log = logging.getLogger(__name__)


class TunnelWatch:
    """Inspects one replica's tunnels twice a second, and closes those that may not stay."""

    def __init__(self, tunnels: Tunnels, fleet: Fleet, keys: KeyRing, feed: ChangeFeed, clock: DatabaseClock) -> None:
        self.tunnels = tunnels
        self._fleet = fleet
        self._keys = keys
        self._feed = feed
        self._clock = clock

    async def run(self) -> None:
        """Inspect until this task is cancelled, then close every connection."""
        try:
            while True:
                await asyncio.sleep(INSPECT_EVERY_SECONDS)
                try:
                    self.inspect()
                except Exception:  # noqa: BLE001 - an inspection that fails must not be the last
                    _log.exception("a look at the tunnels failed")
        finally:
            for tunnel in self.tunnels:
                tunnel.close("The service stops.")

    def inspect(self) -> None:
        """Inspect every connection once, and tell the agents how many replicas there are."""
        for tunnel in self.tunnels:
            if (fault := tunnel.find_fault() or self._fault_of(tunnel.grant)) is not None:
                tunnel.close(fault)
        self.tunnels.greet(self._fleet.replicas.count())

    async def require(self, grant: TunnelGrant) -> None:
        """Check that an agent may connect. Another replica may have only just written what allows it.

        Raises:
            InvalidRequest: the node has an address of its own, or its newest heartbeat is of another bootId.
        """
        if self._fault_of(grant) is not None:
            await self._feed.catch_up()
        node = self._fleet.find_node(grant.passport_id)
        if node is not None and not node.state.passport.is_outbound:
            message = "The node is reached at its inferenceUrl. Set metadata.connectivity to outbound first."
            raise InvalidRequest.at("passportId", message)
        if self._fault_of(grant) is not None:
            message = "The node's newest heartbeat has another bootId. Send a heartbeat first, or make a new bootId."
            raise InvalidRequest.at("bootId", message)

    def _fault_of(self, grant: TunnelGrant) -> str | None:
        """Return why a connection may not stay; None if it may."""
        if not self._keys.is_valid(grant.key_id, self._clock.now()):
            return "The key is revoked or has expired."
        node = self._fleet.find_node(grant.passport_id)
        if node is None or node.record.has_ended:
            return "The node is deregistered or revoked."
        if not node.state.passport.is_outbound:
            return "The node is reached at its inferenceUrl now."
        receipt = node.state.last_heartbeat
        boot_id = None if receipt is None else receipt.heartbeat.boot_id
        return _FORMER_BOOT if boot_id is not None and boot_id != grant.boot_id else None
