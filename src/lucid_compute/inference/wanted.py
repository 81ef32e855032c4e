"""What a choice of a node is about."""

from __future__ import annotations

from collections.abc import Collection

from lucid_compute.passports import ModelPassport
from lucid_compute.routing_rules import NO_POLICY, RoutingPolicy


class Wanted:
    """A model at an endpoint, the request's policy, its session's name, and the nodes that were tried already."""

    __slots__ = ("endpoint", "explores", "is_stream", "kind", "model", "policy", "session", "tried")

    def __init__(
        self,
        model: ModelPassport,
        policy: RoutingPolicy = NO_POLICY,
        *,
        endpoint: str = "chat/completions",
        session: str | None = None,
        is_stream: bool = False,
    ) -> None:
        """Nothing was tried yet."""
        self.model = model
        self.policy = policy
        self.endpoint = endpoint
        self.session = session
        self.is_stream = is_stream
        self.kind = (model.id, is_stream)  # of requests that take alike long
        self.tried: Collection[str] = ()
        self.explores = False  # whether the node was chosen to see how it does by now
