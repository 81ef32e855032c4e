"""The ring of keys in memory: what is cached ends when its key does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lucid_compute.errors import Unauthorized
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.fleet.key_ring import KeyRecord, KeyRing, Secret, digest_of, make_secret

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(secret: Secret, **fields: Any) -> KeyRecord:
    """A key as stored."""
    basis: dict[str, Any] = {
        "id": secret.key_id,
        "digest": digest_of(secret.text),
        "owner": "olga",
        "scopes": frozenset({Scope.COMPUTE}),
        "passport_id": None,
        "limits": None,
        "expires_at": None,
        "revoked_at": None,
        "former_digest": None,
        "former_valid_until": None,
        "is_bootstrap": False,
        "revision": 1,
    }
    return KeyRecord(**{**basis, **fields})


def test_a_key_that_was_used_before_it_expired_is_refused_from_that_instant_on() -> None:
    """The cache of used keys ends no later than the key."""
    secret = make_secret()
    expires_at = NOW + timedelta(seconds=10)
    ring = KeyRing()
    ring.synced_at = NOW
    ring.apply([record(secret, expires_at=expires_at)])
    for _ in range(2):
        assert ring.authenticate(secret.text, expires_at - timedelta(microseconds=1)).owner == "olga"
    with pytest.raises(Unauthorized):
        ring.authenticate(secret.text, expires_at)


def test_ended_keys_are_forgotten_after_a_day_and_no_older_copy_revives_them_before() -> None:
    revoked, expired, live = (make_secret() for _ in range(3))
    ring = KeyRing()
    ring.apply([record(revoked, revoked_at=NOW, revision=2), record(expired, expires_at=NOW), record(live)])
    for age in (timedelta(0), timedelta(hours=23, minutes=59)):
        ring.synced_at = NOW + age
        ring.forget_ended(NOW + age)
        ring.apply([record(revoked)])  # as it was before it was revoked
        for secret in (revoked, expired):
            with pytest.raises(Unauthorized):
                ring.authenticate(secret.text, NOW + age)
    ring.used_ids = {revoked.key_id, live.key_id}
    ring.forget_ended(NOW + timedelta(days=1))
    assert set(ring._keys) == ring.used_ids == {live.key_id}
    ring.synced_at = NOW + timedelta(days=1)
    assert ring.authenticate(live.text, NOW + timedelta(days=1)).owner == "olga"


def test_forgetting_keys_leaves_a_rotated_ones_previous_secret_valid_for_its_24_hours() -> None:
    former = make_secret()
    newer = make_secret(former.key_id)
    until = NOW + timedelta(hours=24)
    ring = KeyRing()
    fields = {"former_digest": digest_of(former.text), "former_valid_until": until, "revision": 2}
    ring.apply([record(newer, **fields)])
    for now, is_valid in ((NOW, True), (until - timedelta(seconds=1), True), (until, False)):
        ring.synced_at = now
        ring.forget_ended(now)
        assert ring.authenticate(newer.text, now).owner == "olga"
        if is_valid:
            assert ring.authenticate(former.text, now).owner == "olga"
        else:
            with pytest.raises(Unauthorized):
                ring.authenticate(former.text, now)
