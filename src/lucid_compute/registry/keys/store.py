"""API keys in Postgres: create, change, rotate, revoke and list them, and the first admin key of an empty database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, DateTime, RowMapping, cast, collate, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import InvalidRequest, KeyNotFound
from lucid_compute.postgres.changes import announce
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import ids_are_uuids, in_order
from lucid_compute.postgres.tables import api_keys, passports
from lucid_compute.registry.domain.identity import SYSTEM, Actor, Scope
from lucid_compute.registry.domain.key_limits import KeyLimits
from lucid_compute.registry.domain.metadata import merge_patch
from lucid_compute.registry.fleet.key_ring import PREFIX, KeyRing, Secret, digest_of, make_secret
from lucid_compute.registry.fleet.rows import read_key
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.registry.keys.shapes import KeyCreate, KeyPatch, KeyView, NewKey
from lucid_compute.wire import SortBy, SortOrder, faults_from

ROTATION_OVERLAP = timedelta(hours=24)
BOOTSTRAP_LOCK = 0x6B657973  # the number of an advisory lock: "keys" in ASCII
_SORT_COLUMNS = {
    SortBy.CREATED_AT: api_keys.c.created_at,
    SortBy.UPDATED_AT: func.coalesce(api_keys.c.rotated_at, api_keys.c.created_at),
    SortBy.NAME: collate(api_keys.c.name, "C"),
}
_CHANGED = ("name", "expires_at", "limits")
_VIEW_COLUMNS = [api_keys.c[name] for name in KeyView.model_fields]

# One array for all ids: Postgres takes at most 32,767 parameters.
_RECORD_USED = text("UPDATE api_keys SET last_used_at = now() WHERE id = ANY(CAST(:ids AS text[]))")


class KeyStore:
    """The only writer of keys. Each change is applied to `ring` at once."""

    def __init__(self, database: Database, ring: KeyRing) -> None:
        self._database = database
        self._ring = ring

    async def create(self, actor: Actor, new: KeyCreate) -> NewKey:
        """Create a key; its secret is in the return value and nowhere else.

        Raises:
            InvalidRequest: `expires_at` is past, or the key would be bound to a node of another owner.
        """
        secret = make_secret()
        async with self._database.transaction() as connection:
            await _check_expiry(connection, new.expires_at)
            await _check_binding(connection, new)
            row = await _insert(connection, secret, new)
            details = {"owner": new.owner, "scopes": sorted(new.scopes)}
            await record_change(connection, actor, Change("key.create", "key", secret.key_id, details=details))
            await announce(connection)
        return self._apply_new(row, secret)

    async def change(self, actor: Actor, key_id: str, patch: KeyPatch) -> KeyView:
        """Change a key's name, expiry or limits as an RFC 7396 merge patch says; its secret stays.

        Raises:
            KeyNotFound: there is no such key, or it is revoked.
            InvalidRequest: the changed key would not be valid, or it is the bootstrap key.
        """
        wanted = patch.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if wanted.get("name", "") is None:
            raise InvalidRequest.at("name", "A key has a name. Send another, or leave it out.")
        async with self._database.transaction() as connection:
            former = await _lock(connection, key_id)
            if former["is_bootstrap"]:
                raise InvalidRequest.at("keyId", "The bootstrap key is set by LUCID_BOOTSTRAP_ADMIN_KEY alone.")
            changes: dict[str, Any] = {}
            if "name" in wanted:
                changes["name"] = patch.name
            if "expiresAt" in wanted:
                await _check_expiry(connection, patch.expires_at)
                changes["expires_at"] = patch.expires_at
            if "limits" in wanted:
                changes["limits"] = _merged_limits(former["limits"], wanted["limits"])
            row = await _change(connection, key_id, **changes) if changes else former
            before, after = ({name: each[name] for name in _CHANGED} for each in (former, row))
            change = Change("key.change", "key", key_id, before, after, {"fields": sorted(wanted)})
            await record_change(connection, actor, change)
            await announce(connection)
        self._ring.apply([read_key(row)])
        return _view(row)

    async def rotate(self, actor: Actor, key_id: str, *, now: bool) -> NewKey:
        """Give a key a new secret. The previous one stays valid for 24 hours, or ends at once with `now`.

        Raises:
            KeyNotFound: there is no such key, or it is revoked.
            InvalidRequest: it is the bootstrap key, whose secret comes from the settings.
        """
        secret = make_secret(key_id)
        async with self._database.transaction() as connection:
            former = await _lock(connection, key_id)
            if former["is_bootstrap"]:
                raise InvalidRequest.at("keyId", "Change LUCID_BOOTSTRAP_ADMIN_KEY to rotate the bootstrap key.")
            row = await _change(
                connection,
                key_id,
                digest=secret.digest,
                last_four=secret.last_four,
                former_digest=None if now else former["digest"],
                former_valid_until=None if now else func.now() + ROTATION_OVERLAP,
                rotated_at=func.now(),
            )
            await record_change(connection, actor, Change("key.rotate", "key", key_id, details={"now": now}))
            await announce(connection)
        return self._apply_new(row, secret)

    async def revoke(self, actor: Actor, key_id: str) -> None:
        """Revoke a key at once.

        Raises:
            KeyNotFound: there is no such key, or it is revoked.
        """
        async with self._database.transaction() as connection:
            await _lock(connection, key_id)
            row = await _change(connection, key_id, revoked_at=func.now())
            await record_change(connection, actor, Change("key.revoke", "key", key_id))
            await announce(connection)
        self._ring.apply([read_key(row)])

    async def get(self, key_id: str) -> KeyView:
        """Return a key.

        Raises:
            KeyNotFound: there is no such key, or it is revoked.
            DatabaseUnavailable: the database can't be reached.
        """
        known = select(*_VIEW_COLUMNS).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        async with self._database.transaction() as connection:
            row = (await connection.execute(known)).mappings().one_or_none()
        if row is None:
            raise KeyNotFound(key_id)
        return _view(row)

    async def list_page(
        self, *, owner: str | None, sort_by: SortBy, sort_order: SortOrder, offset: int, limit: int
    ) -> tuple[list[KeyView], int]:
        """Return a page of the keys that are not revoked, and their total number."""
        conditions: list[ColumnElement[bool]] = [api_keys.c.revoked_at.is_(None)]
        if owner is not None:
            conditions.append(api_keys.c.owner == owner)
        order = in_order(_SORT_COLUMNS, api_keys.c.id, sort_by, sort_order)
        page = select(*_VIEW_COLUMNS).where(*conditions).order_by(*order)
        async with self._database.transaction() as connection:
            total = await connection.scalar(select(func.count()).select_from(api_keys).where(*conditions))
            rows = await connection.execute(page.offset(offset).limit(limit))
            return [_view(row) for row in rows.mappings()], total or 0

    async def record_used(self) -> None:
        """Store now as the time of last use of the keys that were used since the last call."""
        used, self._ring.used_ids = self._ring.used_ids, set()
        if not used:
            return
        try:
            async with self._database.transaction() as connection:
                await connection.execute(_RECORD_USED, {"ids": sorted(used)})
        except BaseException:
            self._ring.used_ids |= used  # the next call records them
            raise

    def forget_ended(self, now: datetime) -> None:
        """Forget keys in memory that ended more than a day ago. Their rows stay."""
        self._ring.forget_ended(now)

    def _apply_new(self, row: RowMapping, secret: Secret) -> NewKey:
        self._ring.apply([read_key(row)])
        return NewKey(**_view(row).model_dump(), key=secret.text)


async def bootstrap(database: Database, own_key: str | None, save: Callable[[str], None]) -> str | None:
    """Ensure that there is an admin key: `own_key`, or a new one for a database without keys. Return a new key.

    Replicas that start together create only one. `save` gets a new key before the commit, so that a kill in between
    loses no valid key.
    """
    async with database.transaction() as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": BOOTSTRAP_LOCK})
        if own_key is not None:
            await _set_bootstrap_key(connection, own_key)
            return None
        if await connection.scalar(select(func.count()).select_from(api_keys)):
            return None
        secret = make_secret()
        await _insert(connection, secret, KeyCreate(name="first admin key", owner="admin", scopes=[Scope.ADMIN]))
        await record_change(connection, SYSTEM, Change("key.bootstrap", "key", secret.key_id))
        await announce(connection)
        save(secret.text)
        return secret.text


async def is_valid(database: Database, key: str | None) -> bool:
    """Return whether the database has this key and it is not revoked."""
    if not key:
        return False
    known = select(api_keys.c.id).where(api_keys.c.digest == digest_of(key), api_keys.c.revoked_at.is_(None))
    async with database.transaction() as connection:
        return await connection.scalar(known) is not None


async def _set_bootstrap_key(connection: AsyncConnection, own_key: str) -> None:
    digest = digest_of(own_key)
    live = [api_keys.c.is_bootstrap, api_keys.c.revoked_at.is_(None)]
    former = (await connection.execute(select(api_keys).where(*live))).mappings().one_or_none()
    if former is not None:
        if former["digest"] == digest:
            return
        await _change(connection, former["id"], revoked_at=func.now())
    secret = Secret(own_key, f"bootstrap-{digest.hex()[:12]}", digest)
    revoked = api_keys.delete().where(api_keys.c.id == secret.key_id).returning(api_keys.c.revision)
    revoked_revision = await connection.scalar(revoked) or 0  # running replicas know it as revoked: be newer
    new = KeyCreate(name="LUCID_BOOTSTRAP_ADMIN_KEY", owner="admin", scopes=[Scope.ADMIN])
    await _insert(connection, secret, new, is_bootstrap=True, revision=revoked_revision + 1)
    await record_change(connection, SYSTEM, Change("key.bootstrap", "key", secret.key_id))
    await announce(connection)


async def _insert(
    connection: AsyncConnection, secret: Secret, new: KeyCreate, *, is_bootstrap: bool = False, revision: int = 1
) -> RowMapping:
    statement = insert(api_keys).values(
        id=secret.key_id,
        name=new.name,
        owner=new.owner,
        scopes=sorted({scope.value for scope in new.scopes}),
        passport_id=new.passport_id,
        digest=secret.digest,
        prefix="" if is_bootstrap else f"{PREFIX}{secret.key_id}",
        last_four=secret.last_four,
        limits=None if new.limits is None else _stored_limits(new.limits),
        expires_at=new.expires_at,
        is_bootstrap=is_bootstrap,
        revision=revision,
    )
    row: RowMapping = (await connection.execute(statement.returning(api_keys))).mappings().one()
    return row


def _stored_limits(limits: KeyLimits) -> dict[str, Any] | None:
    """Return the limits that are set: replicas of an older version know not all that there are."""
    return limits.model_dump(mode="json", by_alias=True, exclude_none=True) or None


def _merged_limits(former: dict[str, Any] | None, patch: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the limits to store after a patch.

    Raises:
        InvalidRequest: they would be half a budget.
    """
    try:
        return _stored_limits(KeyLimits.model_validate(merge_patch(former, patch) or {}))
    except ValidationError as error:
        raise InvalidRequest(faults_from(error.errors(include_url=False), "limits")) from None


async def _lock(connection: AsyncConnection, key_id: str) -> RowMapping:
    if "\x00" in key_id:  # Postgres can't even compare it
        raise KeyNotFound(key_id)
    statement = select(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)).with_for_update()
    row = (await connection.execute(statement)).mappings().one_or_none()
    if row is None:
        raise KeyNotFound(key_id)
    return row


async def _change(connection: AsyncConnection, key_id: str, **changes: Any) -> RowMapping:
    statement = (
        update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(revision=api_keys.c.revision + 1, changed_xid=func.pg_current_xact_id(), **changes)
        .returning(api_keys)
    )
    row: RowMapping = (await connection.execute(statement)).mappings().one()
    return row


async def _check_expiry(connection: AsyncConnection, expires_at: datetime | None) -> None:
    if expires_at is None:
        return
    if not await connection.scalar(select(cast(expires_at, DateTime(timezone=True)) > func.now())):
        raise InvalidRequest.at("expiresAt", "It lies in the past. Send a later instant, or leave it out.")


async def _check_binding(connection: AsyncConnection, new: KeyCreate) -> None:
    if new.passport_id is None:
        return
    if set(new.scopes) != {Scope.COMPUTE}:
        raise InvalidRequest.at("passportId", "Only a key with the one scope compute can be bound to a node.")
    owner = None
    if ids_are_uuids(new.passport_id):
        is_node = (passports.c.id == new.passport_id) & (passports.c.type == "compute")
        owner = await connection.scalar(select(passports.c.owner).where(is_node))
    if owner != new.owner:
        message = f"{new.owner!r} owns no node {new.passport_id!r}. Register the node first, or name its owner."
        raise InvalidRequest.at("passportId", message)


def _view(row: RowMapping) -> KeyView:
    return KeyView(**{name: row[name] for name in KeyView.model_fields})
