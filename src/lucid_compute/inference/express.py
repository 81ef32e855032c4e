"""A request that is served without a task: sent on an idle connection, and answered when the node's answer is whole.

A task, a future and the turns of the loop between them cost as much as everything else that a short request needs
(docs/adr/0013-express-lane.md). So what needs no waiting but for its node is done by callbacks; as soon as anything is
out of the ordinary, the request goes on in a task, with what was learnt so far.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from lucid_compute.egress.faults import EgressFault
from lucid_compute.egress.http_connection import HttpConnection
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.attempt import Answer, Attempt, was_closed_before
from lucid_compute.inference.call import Call
from lucid_compute.inference.exchange import CutReason, Exchange
from lucid_compute.inference.targets import Target
from lucid_compute.inference.tools import Tools


class Ready(NamedTuple):
    """A node that a request can be sent to at once."""

    node: FleetNode
    target: Target
    connection: HttpConnection


class HandedOver(NamedTuple):
    """How a request ends that goes on in a task; `failed` is the node that was tried first and how it failed."""

    failed: tuple[FleetNode, EgressFault] | None


Ending = Answer | HandedOver | CutReason | Exception
OnEnd = Callable[["ExpressExchange", Ending], None]


class ExpressExchange(Exchange):
    """One request without a task. It ends once, and tells `on_end` how."""

    __slots__ = ("_attempt", "_on_end", "_ready", "_tools", "call")

    call: Call
    _ready: Ready

    def __init__(self, tools: Tools, on_end: OnEnd) -> None:
        """Send nothing yet."""
        super().__init__()
        self.has_body = True
        self._tools = tools
        self._on_end = on_end
        self._attempt: Attempt | None = None

    @property
    def node_id(self) -> str:
        """Who is asked."""
        return self._ready.node.state.id

    def start(self, call: Call, ready: Ready, now: datetime) -> None:
        """Send the call to the node."""
        self.call = call
        self._ready = ready
        attempt = self._attempt = Attempt(self._tools, call, ready.node, 1, now)
        attempt.begin()
        ready.connection.on_ready = self._take_in
        attempt.send(ready.connection, ready.target)

    def leave(self) -> None:
        """End it because its client left."""
        self.end(CutReason.CLIENT_LEFT)

    def end(self, reason: CutReason) -> None:
        """End it from our side, or because the client left: the node is hung up on at once."""
        attempt = self._attempt
        if attempt is not None:
            self.cut = reason
            attempt.note_cancelled(reason)
            self._finish(attempt)
            self._tell(reason)

    def _take_in(self) -> None:
        """Take the node's answer, or its failure. Nothing may be raised: a transport calls this."""
        attempt, connection = self._attempt, self._ready.connection
        if attempt is None or not connection.is_ready:
            return
        ending: Ending
        try:
            ending = attempt.judge(connection, connection.take())
            attempt.note_success()
        except EgressFault as fault:
            if was_closed_before(connection, fault) and attempt.can_be_undone:
                self._attempt = connection.on_ready = None
                attempt.undo()
                self.call.mistrusts_idle = True
                self._tools.client.give_back(self._ready.target.url, connection)
                self._tell(HandedOver(None))
                return
            attempt.note_fault(fault)
            ending = HandedOver((self._ready.node, fault.with_traceback(None)))  # which holds this frame
        except Exception as error:  # noqa: BLE001 - answered as the ordinary lane answers its own failures
            attempt.note_broken()
            ending = error
        self._finish(attempt)
        self._tell(ending)

    def _tell(self, ending: Ending) -> None:
        self._on_end(self, ending)
        del self.call  # it holds this too, and both would stay until garbage is collected

    def _finish(self, attempt: Attempt) -> None:
        self._attempt = self._ready.connection.on_ready = None  # they hold this, and would until garbage is collected
        attempt.close()
        self._tools.client.give_back(self._ready.target.url, self._ready.connection)
