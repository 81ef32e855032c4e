"""The ring of keys in memory: what is cached ends when its key does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from lucid_compute.errors import Unauthorized
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.fleet.key_ring import KeyRecord, KeyRing, digest_of, make_secret

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_key_that_was_used_before_it_expired_is_refused_from_that_instant_on() -> None:
    """The cache of used keys ends no later than the key."""
    secret = make_secret()
    expires_at = NOW + timedelta(seconds=10)
    ring = KeyRing()
    ring.synced_at = NOW
    ring.apply(
        [
            KeyRecord(
                id=secret.key_id,
                digest=digest_of(secret.text),
                owner="olga",
                scopes=frozenset({Scope.COMPUTE}),
                passport_id=None,
                limits=None,
                expires_at=expires_at,
                revoked_at=None,
                former_digest=None,
                former_valid_until=None,
                is_bootstrap=False,
                revision=1,
            )
        ]
    )
    for _ in range(2):
        assert ring.authenticate(secret.text, expires_at - timedelta(microseconds=1)).owner == "olga"
    with pytest.raises(Unauthorized):
        ring.authenticate(secret.text, expires_at)
