"""Serves `POST /compute/heartbeat` without FastAPI and ASGI: a heartbeat is answered after its commit.

Measured, the framework costs more than the commit (docs/adr/0003-heartbeat-lane.md). The body is validated by the
Pydantic type that the OpenAPI document shows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from pydantic import ValidationError

from lucid_compute.errors import InvalidRequest, LucidError, MethodNotAllowed, NodeDeregistered
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.node_state import (
    FRESH_WINDOW,
    HEARTBEAT_INTERVAL_SECONDS,
    HEARTBEAT_JITTER,
    LIVE_WINDOW,
    GpuReading,
    Heartbeat,
    NodeStatus,
    Receipt,
    ReportedRuntime,
)
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.heartbeat_writer import Outcome
from lucid_compute.registry.keys.authentication import Admission, Authenticator
from lucid_compute.registry.keys.dependencies import COMPUTE_WRITERS
from lucid_compute.registry.keys.rate_limits import HeartbeatRate, UnknownNodeRate
from lucid_compute.web.bodies import Body, BodyRoom, ClientLeft
from lucid_compute.web.errors import answer, log_unexpected, stopping
from lucid_compute.web.lanes import CutReason, IncomingRequest, LaneClient, Response, Wait
from lucid_compute.web.strict_json import Known, read_strictly, require_few_values
from lucid_compute.wire import ForgivingShape, faults_from, write_instant

PATH = "/compute/heartbeat"
JITTERS = 512
MAX_REPORT_BYTES = 4096  # of a body that is stored as it is; a group commit has up to 1,000
_COLONS_OF_AN_INSTANT = 2  # in UTC; with an offset there are more
_JSON = (b"content-type", b"application/json")


class _Ending:
    """The ends of responses: when the next heartbeat is due, spread evenly over the interval's jitter.

    They are written once and given in turn, in a random order, so that nodes of one group commit do not come back
    together. All are of one length.
    """

    __slots__ = ("_next", "_texts")

    def __init__(self, *, is_draining: bool) -> None:
        shortest = HEARTBEAT_INTERVAL_SECONDS * (1 - HEARTBEAT_JITTER)
        step = HEARTBEAT_INTERVAL_SECONDS * HEARTBEAT_JITTER * 2 / (JITTERS - 1)
        drain = "true" if is_draining else "false"
        self._texts = [f'{shortest + number * step:.3f},"drain":{drain}}}' for number in range(JITTERS)]
        random.shuffle(self._texts)
        self._next = 0

    def next(self) -> str:
        """Return the next one."""
        self._next = (self._next + 1) % JITTERS
        return self._texts[self._next]


_ENDING, _DRAIN_ENDING = _Ending(is_draining=False), _Ending(is_draining=True)


class _Instants:
    """What all responses of one group commit share: `middles` is their middle part by status, as JSON."""

    __slots__ = ("live_since", "middles", "received_at")

    def __init__(self, received_at: datetime, live_since: datetime) -> None:
        """`live_since` is as in `NodeState.status`."""
        self.received_at = received_at
        self.live_since = live_since
        fresh_until, unhealthy_at = received_at + FRESH_WINDOW, received_at + LIVE_WINDOW
        times = (
            f'"receivedAt":"{write_instant(received_at)}","freshUntil":"{write_instant(fresh_until)}",'
            f'"unhealthyAt":"{write_instant(unhealthy_at)}","nextHeartbeatInSeconds":'
        )
        self.middles = {status: f'","status":"{status.value}",{times}' for status in NodeStatus}


class HeartbeatAdmission(Admission):
    """A heartbeat: `heartbeat` is set once its body is read, `node` once it is admitted. Then its commit is awaited.

    `report` is its body, if Postgres can store that as it is. `is_repeated` is set when the writer finds that it is a
    repeat.
    """

    heartbeat: Heartbeat | None = None
    report: bytes | None = None
    is_repeated = False
    node: FleetNode

    def __init__(self, lane: HeartbeatLane, client: LaneClient, request: IncomingRequest) -> None:
        super().__init__(client, request)
        self._lane = lane

    def step(self) -> Wait | None:
        """Admit the heartbeat and queue it for a commit; return what must be awaited first.

        Raises:
            LucidError: the heartbeat is refused.
        """
        return None if self.is_over else self._lane.step(self)

    def refuse(self, error: Exception) -> None:
        """Refuse the heartbeat."""
        self._lane.refuse(self, error)

    def cut(self, reason: CutReason) -> None:
        """End the request. The heartbeat is committed anyway if it was queued."""
        self._lane.cut(self, reason)

    def respond(self, outcome: Outcome) -> None:
        """Send the response. It may not raise: the writer notifies others after this one."""
        if self.is_over:
            return
        if outcome is None:
            self.is_repeated = True
            self.advance()
        elif isinstance(outcome, Exception):
            self._lane.refuse(self, outcome)
        else:
            self._lane.answer(self, outcome)


AwaitStep = Callable[[HeartbeatAdmission], Awaitable[None]]
"""Gets what a heartbeat still lacks: its key from the database, its body, or its node from the feed."""


class HeartbeatLane:
    """Serves heartbeats, and responds to each after its commit.

    `outcomes` counts how they ended, `express` counts those that were queued without a task.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        fleet: Fleet,
        clock: DatabaseClock,
        registry: ComputeRegistry,
        *,
        max_per_second: float,
        room: BodyRoom,
    ) -> None:
        """A node may send `max_per_second` heartbeats on average; 0 is no limit. Their bodies take of `room`."""
        self._authenticator = authenticator
        self._fleet = fleet
        self._clock = clock
        self._registry = registry
        self._rate = HeartbeatRate(max_per_second)
        self._room = room
        self._unknown = UnknownNodeRate()
        self._instants: _Instants | None = None
        self.outcomes: Counter[str] = Counter()
        self.express = 0

    def admit(self, admission: HeartbeatAdmission, now: datetime) -> Heartbeat | AwaitStep:
        """Return the heartbeat if it is admitted, else what to await before calling `admit` again.

        A second call repeats no work. The node's allowance is spent last.

        Raises:
            LucidError: the heartbeat is refused.
        """
        principal = admission.principal
        if principal is None:
            if admission.method != "POST":
                raise MethodNotAllowed(admission.method, ["POST"])
            principal = admission.principal = self._authenticator.find_known(admission.authorization, now)
            if principal is None:
                return self._authenticator.await_key
        heartbeat = admission.heartbeat
        if heartbeat is None:
            principal.require(COMPUTE_WRITERS)
            if admission.body is None:
                return self._await_body
            heartbeat, admission.report = read_heartbeat(admission.body)
            admission.heartbeat = heartbeat
        passport_id = heartbeat.passport_id
        node = self._fleet.find_visible(passport_id, principal.visible_owner)
        if node is None:
            return partial(self._await_node, passport_id, principal)
        if node.record.has_ended:
            raise NodeDeregistered(passport_id)
        admission.node = node
        principal.require_node(passport_id)
        self._rate.spend(passport_id)
        return heartbeat

    def accept(self, client: LaneClient, request: IncomingRequest) -> HeartbeatAdmission | None:
        """Queue a heartbeat for a commit, or refuse it. Return it while it waits; None when it was answered already."""
        admission = HeartbeatAdmission(self, client, request)
        admission.advance()
        if admission.is_over:
            return None
        self.express += not admission.is_waiting
        return admission

    def step(self, admission: HeartbeatAdmission) -> Wait | None:
        """Admit a heartbeat and queue it for a commit; return what must be awaited first.

        Raises:
            LucidError: the heartbeat is refused.
        """
        if admission.is_repeated:
            return partial(self._await_newest_receipt, admission)
        heartbeat = self.admit(admission, self._clock.now())
        if not isinstance(heartbeat, Heartbeat):
            return partial(heartbeat, admission)
        self._registry.submit(heartbeat, admission.respond, admission.report)
        return None

    def answer(self, admission: HeartbeatAdmission, receipt: Receipt) -> None:
        """Count a committed heartbeat, and send its response."""
        self.outcomes["ACCEPTED"] += 1
        admission.is_over = True
        body = self._body_of(admission.node, receipt)
        headers = [_JSON, (b"content-length", b"%d" % len(body))]
        admission.client.answer(200, headers, body)

    def refuse(self, admission: HeartbeatAdmission, error: Exception) -> None:
        """Count a heartbeat and answer it with an error."""
        admission.is_over = True
        admission.client.answer(*self._refusal_of(error, admission.method))

    def cut(self, admission: HeartbeatAdmission, reason: CutReason) -> None:
        """End a heartbeat because its client left or the service stops."""
        if reason is CutReason.SHUTDOWN:
            self.refuse(admission, stopping())
        else:
            admission.is_over = True
            self.outcomes[reason.upper()] += 1
            admission.client.hang_up()

    def _refusal_of(self, error: Exception, method: str) -> Response:
        """Count a refused heartbeat; return its response. A request with another method than POST is not counted."""
        if not isinstance(error, LucidError):
            error = log_unexpected(method, PATH, error, None)
        if not isinstance(error, MethodNotAllowed):
            self.outcomes[error.code] += 1
        response = answer(error)
        return response.status_code, response.raw_headers, bytes(response.body)

    async def _await_newest_receipt(self, admission: HeartbeatAdmission) -> None:
        """Send a repeat the newest receipt of its node, once this replica has caught up with the database."""
        self.answer(admission, await self._registry.newest_receipt(admission.node.state.id))

    async def _await_body(self, admission: HeartbeatAdmission) -> None:
        if admission.receive is None:
            raise ClientLeft
        body = Body(self._room, admission.headers)
        try:
            admission.body = await body.read(admission.receive)
        finally:
            body.release()  # it is parsed at once

    async def _await_node(self, passport_id: str, principal: Principal, _: HeartbeatAdmission) -> None:
        """Wait for a node that another replica may have only just registered."""
        self._unknown.spend(principal.key_id)
        await self._registry.get_node(passport_id, visible_owner=principal.visible_owner)
        self._unknown.take_back(principal.key_id)

    def _body_of(self, node: FleetNode, receipt: Receipt) -> bytes:
        """Return the node's state as JSON, written by hand: most of it is the same within one group commit."""
        state, instants = node.state, self._instants
        if instants is None or instants.received_at != receipt.received_at:
            live_since = self._fleet.live_since(receipt.received_at)
            instants = self._instants = _Instants(receipt.received_at, live_since)
        ending = _ENDING if state.draining_since is None else _DRAIN_ENDING
        middle = instants.middles[state.status(instants.live_since)]
        return f'{{"passportId":"{receipt.heartbeat.passport_id}{middle}{ending.next()}'.encode()


def _keys_of(shape: type[ForgivingShape]) -> Known:
    return dict.fromkeys(field.alias or name for name, field in shape.model_fields.items())


_KNOWN = {**_keys_of(Heartbeat), "runtime": _keys_of(ReportedRuntime), "gpus": _keys_of(GpuReading)}


def read_heartbeat(body: bytes) -> tuple[Heartbeat, bytes | None]:
    """Return the heartbeat in a body; and the body, if it has the heartbeat's fields and nothing else to store.

    What stands in an unknown field is ignored, whatever it is: a newer agent must not go dark.

    Raises:
        InvalidRequest: it is not valid; the error names every fault.
    """
    require_few_values(body)
    try:
        heartbeat = Heartbeat.model_validate_json(body)
    except ValidationError:
        return _read_again(body), None
    if b"\\" in body or body.count(b":") != _count_colons(heartbeat):
        read_strictly(body, _KNOWN)  # more keys or colons than fields have: a key may be in it twice
        return heartbeat, None
    # Of a number with an exponent, such as 1e-9999, Postgres stores every digit.
    is_stored_as_is = len(body) <= MAX_REPORT_BYTES and b"e-" not in body and b"E" not in body
    return heartbeat, body if is_stored_as_is else None


def _count_colons(heartbeat: Heartbeat) -> int:
    """Return how many colons a body has that has each field of the heartbeat once, and nothing else or escaped."""
    fields = heartbeat.model_fields_set
    colons = len(fields) + heartbeat.passport_id.count(":")
    for model in heartbeat.available_models:
        colons += model.count(":")
    if heartbeat.boot_id is not None:
        colons += heartbeat.boot_id.count(":")
    if heartbeat.sent_at is not None:
        colons += _COLONS_OF_AN_INSTANT
    if heartbeat.detail is not None:
        colons += heartbeat.detail.count(":")
    return colons + _count_nested_colons(heartbeat)


def _count_nested_colons(heartbeat: Heartbeat) -> int:
    colons = 0
    if (runtime := heartbeat.runtime) is not None:
        colons += len(runtime.model_fields_set) + runtime.name.count(":") + (runtime.version or "").count(":")
    for gpu in heartbeat.gpus or ():
        colons += len(gpu.model_fields_set) + (gpu.name or "").count(":")
    return colons


def _read_again(body: bytes) -> Heartbeat:
    """Return the heartbeat of a body whose only fault was a whole number written as 3.0, or in an unknown field.

    Raises:
        InvalidRequest: it has other faults.
    """
    value = read_strictly(body, _KNOWN)
    try:
        return Heartbeat.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidRequest(faults_from(faults)) from None
