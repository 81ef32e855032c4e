"""Who calls the API: the scopes of keys, the principal of a request, and the actor of a change. Pure."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

from lucid_compute.errors import Forbidden
from lucid_compute.registry.domain.key_limits import KeyLimits


class Scope(StrEnum):
    """What a key may do."""

    COMPUTE = "compute"
    PASSPORTS_READ = "passports:read"
    PASSPORTS_WRITE = "passports:write"
    INFERENCE_RUN = "inference:run"
    ADMIN = "admin"


class Principal(NamedTuple):
    """The key that a request was sent with, its owner, and what it may do; `passport_id` binds it to one node."""

    key_id: str
    owner: str
    scopes: frozenset[Scope]
    passport_id: str | None
    limits: KeyLimits | None

    @property
    def is_admin(self) -> bool:
        """Return whether the key may do everything."""
        return Scope.ADMIN in self.scopes

    @property
    def visible_owner(self) -> str | None:
        """The only owner whose passports, jobs and webhooks it may see; None is all owners."""
        return None if self.is_admin else self.owner

    def require(self, allowed: Collection[Scope]) -> None:
        """Refuse a key that has none of the scopes.

        Raises:
            Forbidden: it has none of them; the error names those that are enough.
        """
        if self.scopes.isdisjoint(allowed):
            scopes = " or ".join(sorted(allowed))
            message = f"This key lacks the scope {scopes}. Ask an admin for a key that has it."
            raise Forbidden(message, details={"wantedScopes": sorted(allowed), "scopes": sorted(self.scopes)})

    def require_node(self, passport_id: str) -> None:
        """Refuse a key that is bound to another node.

        Raises:
            Forbidden: it is bound to another node, which the error names.
        """
        if self.passport_id is not None and self.passport_id != passport_id:
            message = f"This key is bound to node {self.passport_id} and may change no other."
            raise Forbidden(message, details={"passportId": self.passport_id})


class Actor(NamedTuple):
    """Who makes a change, for the audit trail: the key, its owner, the client's address, the request."""

    key_id: str | None
    owner: str | None
    ip: str | None = None
    request_id: str | None = None


SYSTEM = Actor(None, None)
