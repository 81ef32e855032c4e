"""lucid_compute.registry.domain.identity."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

from lucid_compute.errors import Forbidden
from lucid_compute.wire import PositiveCount, WireShape


class Scope(StrEnum):
    """What a key may do."""

    COMPUTE = "compute"
    PASSPORTS_READ = "passports:read"
    PASSPORTS_WRITE = "passports:write"
    INFERENCE_RUN = "inference:run"
    ADMIN = "admin"


class KeyLimits(WireShape):
    """A key's own limits; what is null is unlimited."""

    requests_per_minute: PositiveCount | None = None
    tokens_per_minute: PositiveCount | None = None


class Principal(NamedTuple):
    """Who makes a request: a key, its owner, and what it may do."""

    key_id: str
    owner: str
    scopes: frozenset[Scope]
    passport_id: str | None
    limits: KeyLimits | None

    @property
    def is_admin(self) -> bool:
        """Return whether it may do everything."""
        return Scope.ADMIN in self.scopes

    @property
    def visible_owner(self) -> str | None:
        """The owner whose things it sees; None is everyone's."""
        return None if self.is_admin else self.owner

    def require(self, allowed: Collection[Scope]) -> None:
        """Refuse a key that has none of the scopes.

        Raises:
            Forbidden: naming the scopes that would do.
        """
        if self.scopes.isdisjoint(allowed):
            wanted = " or ".join(sorted(allowed))
            message = f"This key lacks the scope {wanted}. Ask an admin for a key that has it."
            raise Forbidden(message, details={"wantedScopes": sorted(allowed), "scopes": sorted(self.scopes)})

    def require_node(self, passport_id: str) -> None:
        """Refuse a key that is bound to another node.

        Raises:
            Forbidden: naming the node it is bound to.
        """
        if self.passport_id is not None and self.passport_id != passport_id:
            message = f"This key is bound to node {self.passport_id} and may change no other."
            raise Forbidden(message, details={"passportId": self.passport_id})


class Actor(NamedTuple):
    """Who makes a change: the key, its owner, the address it came from, the request."""

    key_id: str | None
    owner: str | None
    ip: str | None = None
    request_id: str | None = None


SYSTEM = Actor(None, None)
