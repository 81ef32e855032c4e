"""The express lane of `POST /compute/heartbeat`: heartbeats that are in order are answered without a task.

As with inference requests, it refuses nothing: what is out of the ordinary, and what could not be committed, is the
ordinary lane's to answer.
"""

from __future__ import annotations

from lucid_compute.api.dependencies import COMPUTE_WRITERS
from lucid_compute.api.express_client import ExpressClient
from lucid_compute.api.heartbeat_lane import BegunHeartbeat, HeartbeatLane, read_heartbeat
from lucid_compute.api.service import Service
from lucid_compute.errors import LucidError
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.call import Headers
from lucid_compute.inference.exchange import CutReason
from lucid_compute.storage.heartbeat_writer import Outcome


class ExpressHeartbeat:
    """One heartbeat that waits for its commit."""

    __slots__ = ("_client", "_lane", "_node")

    def __init__(self, lane: HeartbeatLane, client: ExpressClient, node: FleetNode) -> None:
        """Wait."""
        self._lane = lane
        self._client: ExpressClient | None = client
        self._node = node

    def end(self, reason: CutReason) -> None:  # noqa: ARG002 - whatever it is, nobody waits any more
        """Answer nobody; it is committed all the same."""
        self._client = None
        self._lane.outcomes["CLIENT_LEFT"] += 1

    def tell(self, outcome: Outcome) -> None:
        """Answer what became of it. Nothing may be raised: the writer tells others after this one."""
        client, self._client = self._client, None
        if client is None:
            return
        if outcome is None or isinstance(outcome, Exception):
            client.go_on(BegunHeartbeat(self._node, outcome))
            return
        body = self._lane.answer(self._node, outcome)
        headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._lane.outcomes["ACCEPTED"] += 1
        client.answer(200, headers, body)


class ExpressHeartbeats:
    """Takes heartbeats for one replica, in the ordinary lane's name."""

    def __init__(self, service: Service, lane: HeartbeatLane) -> None:
        """Take none yet."""
        self._service = service
        self._lane = lane

    def take(
        self, client: ExpressClient, _path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> ExpressHeartbeat | None:
        """Have a heartbeat committed and answered; None when it is one for the ordinary lane."""
        service, lane = self._service, self._lane
        if service.heartbeats.is_full:
            return None
        try:
            principal = service.authenticator.authenticate_known(headers, service.clock.now())
            principal.require(COMPUTE_WRITERS)
            heartbeat = read_heartbeat(body)
            node = lane.find(heartbeat.passport_id, principal)
            if node is None:
                return None
            principal.require_node(heartbeat.passport_id)
            lane.rate.spend(heartbeat.passport_id)  # last, for the ordinary lane would spend another
        except LucidError:
            return None
        lane.express += 1
        begun = ExpressHeartbeat(lane, client, node)
        service.heartbeats.submit(heartbeat, begun.tell)
        return begun
