"""API keys in memory: their format, how new ones are generated, and who holds a key.

A key is `lk_live_<id 12>_<secret 32><checksum 6>`, all base62. Only the SHA-256 of the complete key is kept: a secret
of 190 bits needs no salt and no slow hash. The security page describes the format.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from hmac import compare_digest
from typing import NamedTuple

from lucid_compute.errors import DatabaseUnavailable, Unauthorized
from lucid_compute.registry.domain.identity import Principal, Scope
from lucid_compute.registry.domain.key_limits import KeyLimits

PREFIX = "lk_live_"
TRUST_WITHOUT_DATABASE = timedelta(seconds=60)
MAX_TOKEN_LENGTH = 512
MAX_CACHED = 10_000
ENDED_KEYS_KEPT = timedelta(days=1)
"""How long a revoked or expired key stays in memory: no copy from before its end is as late as that."""
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY = re.compile(r"lk_live_([0-9A-Za-z]{12})_([0-9A-Za-z]{32})([0-9A-Za-z]{6})")
_NO_DIGEST = sha256(b"no key has this digest").digest()


class Secret(NamedTuple):
    """A new key: its text, shown once, its id, and the digest that is stored."""

    text: str
    key_id: str
    digest: bytes

    @property
    def last_four(self) -> str:
        """The last four characters, shown in lists so that people can tell keys apart."""
        return self.text[-4:]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored. After a rotation, `former_digest` stays valid until `former_valid_until`."""

    id: str
    owner: str
    scopes: frozenset[Scope]
    passport_id: str | None
    digest: bytes
    former_digest: bytes | None
    former_valid_until: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    is_bootstrap: bool
    limits: KeyLimits | None
    revision: int

    def has_ended_before(self, instant: datetime) -> bool:
        """Return whether it was revoked, or had expired, by then."""
        return any(end is not None and end <= instant for end in (self.revoked_at, self.expires_at))


def make_secret(key_id: str | None = None) -> Secret:
    """Generate a new key, or a new secret for the key with that id."""
    key_id = key_id or _random(12)
    body = f"{key_id}_{_random(32)}"
    text = f"{PREFIX}{body}{_checksum(body)}"
    return Secret(text, key_id, digest_of(text))


def digest_of(token: str) -> bytes:
    """Return the digest of a key, which is what is stored."""
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def is_well_formed(token: str) -> bool:
    """Return whether the text has the format of a key and a right checksum."""
    match = _KEY.fullmatch(token)
    return match is not None and _checksum(f"{match[1]}_{match[2]}") == match[3]


class KeyRing:
    """Every key as last read from Postgres; revoked ones are kept for a day, and never valid."""

    def __init__(self) -> None:
        self.synced_at: datetime | None = None
        self.used_ids: set[str] = set()
        self._keys: dict[str, KeyRecord] = {}
        self._bootstrap: KeyRecord | None = None
        self._cache: dict[bytes, tuple[KeyRecord, Principal]] = {}  # by digest, cleared when keys change
        self._unconfirmed: set[str] = set()

    def begin_load(self) -> None:
        """Begin a full load: its keys replace those of now, whatever their revisions say."""
        self._unconfirmed = set(self._keys)

    def end_load(self, present_ids: Collection[str]) -> None:
        """Forget the keys of before that were not in the load. Those that were created meanwhile stay."""
        for key_id in self._unconfirmed.difference(present_ids):
            del self._keys[key_id]
        self._unconfirmed = set()
        self._cache.clear()
        self._find_bootstrap()

    def apply(self, keys: Iterable[KeyRecord]) -> None:
        """Apply the keys that are newer than the current ones. Revoked keys stay, so no older copy revives them."""
        for key in keys:
            current = self._keys.get(key.id)
            if current is None or key.revision > current.revision or key.id in self._unconfirmed:
                self._unconfirmed.discard(key.id)
                self._keys[key.id] = key
                self._cache.clear()
        self._find_bootstrap()

    def _find_bootstrap(self) -> None:
        live = (key for key in self._keys.values() if key.is_bootstrap and key.revoked_at is None)
        self._bootstrap = next(live, None)

    def forget_ended(self, now: datetime) -> None:
        """Forget keys that were revoked or have expired more than a day ago."""
        until = now - ENDED_KEYS_KEPT
        for key_id in [key.id for key in self._keys.values() if key.has_ended_before(until)]:
            del self._keys[key_id]
            self.used_ids.discard(key_id)
            self._cache.clear()

    def authenticate(self, token: str | None, now: datetime) -> Principal:
        """Return the principal of `token`. An unknown key and a wrong secret take the same time.

        Raises:
            Unauthorized: `token` is no valid key.
            DatabaseUnavailable: Postgres has not been read for a minute, so a revocation may have been missed.
        """
        if not token:
            message = "Send a key: Authorization: Bearer lk_live_…"
            raise Unauthorized(message)
        if self.synced_at is None or now - self.synced_at > TRUST_WITHOUT_DATABASE:
            raise DatabaseUnavailable
        digest = digest_of(token[:MAX_TOKEN_LENGTH])
        cached = self._cache.get(digest)
        if cached is not None and (cached[0].expires_at is None or now < cached[0].expires_at):
            self.used_ids.add(cached[0].id)
            return cached[1]
        key, is_former = self._find(token, digest, now)
        self.used_ids.add(key.id)
        principal = Principal(key.id, key.owner, key.scopes, key.passport_id, key.limits)
        if not is_former:  # a former secret ends earlier than its key
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[digest] = (key, principal)
        return principal

    def _find(self, token: str, digest: bytes, now: datetime) -> tuple[KeyRecord, bool]:
        """Return the valid key of `token`, and whether `token` has its secret from before a rotation.

        Raises:
            Unauthorized: there is none.
        """
        match = _KEY.fullmatch(token) if len(token) <= MAX_TOKEN_LENGTH else None
        key = self._keys.get(match[1]) if match else None
        if not _matches(key, digest, now):
            key = self._bootstrap if _matches(self._bootstrap, digest, now) else None  # it may have any format
        if key is None:
            message = "This key is not valid: it is mistyped, expired or revoked. Ask an admin for a new one."
            raise Unauthorized(message)
        return key, not compare_digest(digest, key.digest)

    def is_valid(self, key_id: str, now: datetime) -> bool:
        """Return whether the key is neither revoked nor expired. Long requests are checked while they run."""
        key = self._keys.get(key_id)
        return key is not None and key.revoked_at is None and (key.expires_at is None or key.expires_at > now)

    def __len__(self) -> int:
        """Return the number of keys that are not revoked."""
        return sum(key.revoked_at is None for key in self._keys.values())


def _matches(key: KeyRecord | None, digest: bytes, now: datetime) -> bool:
    expected = key.digest if key else _NO_DIGEST
    former = key.former_digest if key and key.former_digest else _NO_DIGEST
    is_current = compare_digest(digest, expected)
    is_former = compare_digest(digest, former)
    if key is None or key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        return False
    return is_current or (is_former and key.former_valid_until is not None and now < key.former_valid_until)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(6):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
