"""A node as the fleet holds it, and what its operator asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from lucid_compute.fleet.capability_index import CapabilityClass
from lucid_compute.fleet.replicas import Sight
from lucid_compute.node_state import DeclaredModel, NodeState
from lucid_compute.passports import Passport


class Lifecycle(NamedTuple):
    """What an operator asked of a node: its declaration and its drain. `drain_xid` is the transaction that began it.

    `recorded_state` is the last state that an event tells of.
    """

    passport_id: str
    declared: Mapping[str, DeclaredModel]
    draining_since: datetime | None
    drain_xid: int | None
    recorded_state: str
    revision: int


class FleetNode:
    """A node as the fleet holds it; `state` is replaced, never changed."""

    __slots__ = (
        "capability_class",
        "drain_xid",
        "lifecycle_revision",
        "recorded_state",
        "self_drain",
        "state",
    )

    def __init__(self, state: NodeState, capability_class: CapabilityClass) -> None:
        """Start with what is known of it."""
        self.state = state
        self.capability_class = capability_class
        self.lifecycle_revision = 0
        self.drain_xid: int | None = None
        self.recorded_state = "registered"
        self.self_drain: Sight | None = None

    @property
    def record(self) -> Passport:
        """The node's passport as it is stored."""
        return self.state.passport.record
