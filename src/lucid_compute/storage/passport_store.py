"""Passports in Postgres: made, changed, revoked and listed, each change with its audit row in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.egress_policy import EgressPolicy
from lucid_compute.errors import Forbidden, InvalidRequest, PassportExists, PassportNotFound, RequestsInFlight
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.passport_metadata import StoredMetadata, check_name, merge_patch, read_metadata, whole_metadata
from lucid_compute.passports import Passport, PassportStatus, PassportType
from lucid_compute.storage.audit import Actor, Change, record_change
from lucid_compute.storage.compute_registry import add_node_rows
from lucid_compute.storage.database import Database, constraint_of
from lucid_compute.storage.idempotency import Idempotency
from lucid_compute.storage.model_catalog import release_names, take_names
from lucid_compute.storage.node_events import EventType, record_event
from lucid_compute.storage.passport_search import PassportSearch, ids_are_uuids
from lucid_compute.storage.rows import read_passport
from lucid_compute.storage.tables import passports

_NOTHING_STORED = StoredMetadata({}, {})


class NewPassport(NamedTuple):
    """A passport to be made, its owner decided."""

    type: PassportType
    owner: str
    name: str
    description: str | None
    version: str | None
    tags: list[str]
    metadata: Mapping[str, Any]


class PassportStore:
    """The only writer of passports."""

    def __init__(self, database: Database, fleet: Fleet, egress: EgressPolicy) -> None:
        """Write to `database` and show each change to `fleet` at once; `egress` judges provider URLs."""
        self._database = database
        self._fleet = fleet
        self._egress = egress

    async def create(
        self, actor: Actor, new: NewPassport, *, is_admin: bool, idempotency: Idempotency | None = None
    ) -> Passport:
        """Make a passport; a compute passport is a node from then on, without a heartbeat.

        Raises:
            InvalidRequest, Forbidden: its metadata is not as it must be, or names an upstream without being an admin.
            PassportExists, ModelNameTaken: the name is in use.
            IdempotencyConflict: the key was used with another body.
        """
        check_name(new.type, new.name)
        stored = self._read_metadata(new.type, new.metadata, is_admin=is_admin)
        async with self._database.transaction() as connection:
            if idempotency and (former := await idempotency.claim(connection, new.owner)):
                return await self._get(connection, former)
            passport = await self._insert(connection, new, stored)
            if idempotency:
                await idempotency.keep(connection, new.owner, passport.id)
            await take_names(connection, passport)
            if new.type is PassportType.COMPUTE:
                await add_node_rows(connection, passport.id)
                await record_event(connection, passport.id, EventType.REGISTERED)
            change = Change("passport.create", new.type.value, passport.id, after=_comparable(passport, stored))
            await record_change(connection, actor, change)
        self._fleet.apply_passport(passport)
        return passport

    async def change(self, actor: Actor, passport_id: str, patch: Mapping[str, Any], *, sees: str | None) -> Passport:
        """Apply an RFC 7396 merge patch; `sees` is the only owner whose passports may be changed, None is any.

        Raises:
            PassportNotFound, InvalidRequest, Forbidden, PassportExists, ModelNameTaken: as named.
        """
        if patch.get("status") == PassportStatus.REVOKED:
            self._refuse_running(passport_id)
        async with self._database.transaction() as connection:
            row = await self._lock(connection, passport_id, sees)
            former = read_passport(row)
            _refuse_fixed(former, patch)
            stored = self._merge(row, patch, is_admin=sees is None)
            passport = await self._update(connection, former, patch, stored)
            await release_names(connection, former)
            await take_names(connection, passport)
            if former.type is PassportType.COMPUTE:
                revoked = passport.status is PassportStatus.REVOKED
                await record_event(connection, passport_id, EventType.REVOKED if revoked else EventType.UPDATED)
            before = _comparable(former, StoredMetadata(row["metadata"], row["secrets"]))
            after = _comparable(passport, stored)
            change = Change("passport.change", former.type.value, passport_id, before, after)
            await record_change(connection, actor, change)
        self._fleet.apply_passport(passport)
        return passport

    async def revoke(self, actor: Actor, passport_id: str, *, sees: str | None) -> None:
        """Revoke a passport for good; it stays readable, and its name is free again.

        Raises:
            PassportNotFound: there is none.
            RequestsInFlight: requests run on the node.
        """
        self._refuse_running(passport_id)
        async with self._database.transaction() as connection:
            former = read_passport(await self._lock(connection, passport_id, sees))
            if former.status is PassportStatus.REVOKED:
                return
            row = await connection.execute(_set(passport_id, status=PassportStatus.REVOKED.value))
            passport = read_passport(row.mappings().one())
            await release_names(connection, former)
            if former.type is PassportType.COMPUTE:
                await record_event(connection, passport_id, EventType.REVOKED)
            await record_change(connection, actor, Change("passport.revoke", former.type.value, passport_id))
        self._fleet.apply_passport(passport)

    async def get(self, passport_id: str, *, sees: str | None) -> Passport:
        """Answer a passport that is the owner's, or any model's; `sees` None answers any.

        Raises:
            PassportNotFound: there is none.
        """
        async with self._database.transaction() as connection:
            passport = await self._get(connection, passport_id)
        if sees is not None and passport.owner != sees and passport.type is not PassportType.MODEL:
            raise PassportNotFound(passport_id)
        return passport

    async def search(self, search: PassportSearch) -> tuple[list[Passport], int]:
        """Answer a page of passports, and how many match in all."""
        async with self._database.transaction() as connection:
            total = await connection.scalar(select(func.count()).select_from(passports).where(search.condition()))
            rows = await connection.execute(search.page())
            return [read_passport(row) for row in rows.mappings()], total or 0

    def _read_metadata(
        self,
        passport_type: PassportType,
        raw: Mapping[str, Any],
        *,
        is_admin: bool,
        known: StoredMetadata = _NOTHING_STORED,
    ) -> StoredMetadata:
        """Check metadata; URLs and the upstream are judged only where they differ from what is `known`."""
        stored = read_metadata(passport_type, raw)
        if passport_type is PassportType.MODEL and _upstream_of(stored) != _upstream_of(known):
            if not is_admin:
                message = "Only an admin may set, change or remove a model's upstream. Leave metadata.upstream out."
                raise Forbidden(message)
            if upstream := stored.public.get("upstream"):
                self._check_url(upstream["url"], "metadata.upstream.url")
        url = stored.public.get("inferenceUrl")
        if passport_type is PassportType.COMPUTE and url != known.public.get("inferenceUrl"):
            self._check_url(stored.public["inferenceUrl"], "metadata.inferenceUrl")
        return stored

    def _check_url(self, url: str, path: str) -> None:
        try:
            self._egress.check_url(url)
        except ValueError as error:
            raise InvalidRequest.at(path, str(error)) from None

    def _merge(self, row: RowMapping, patch: Mapping[str, Any], *, is_admin: bool) -> StoredMetadata:
        former = StoredMetadata(row["metadata"], row["secrets"])
        if "metadata" not in patch:
            return former
        whole = {} if patch["metadata"] is None else merge_patch(whole_metadata(former), patch["metadata"])
        return self._read_metadata(PassportType(row["type"]), whole, is_admin=is_admin, known=former)

    def _refuse_running(self, passport_id: str) -> None:
        if running := self._fleet.in_flight(passport_id):
            raise RequestsInFlight(running)

    async def _insert(self, connection: AsyncConnection, new: NewPassport, stored: StoredMetadata) -> Passport:
        statement = insert(passports).values(
            id=str(uuid4()),
            type=new.type.value,
            owner=new.owner,
            name=new.name,
            description=new.description,
            version=new.version,
            tags=new.tags,
            metadata=stored.public,
            secrets=stored.secrets,
        )
        return await self._write_named(connection, statement, new.owner, new.type, new.name)

    async def _update(
        self, connection: AsyncConnection, former: Passport, patch: Mapping[str, Any], stored: StoredMetadata
    ) -> Passport:
        changes = {key: value for key, value in patch.items() if key in {"name", "description", "version", "status"}}
        if "tags" in patch:
            changes["tags"] = patch["tags"] or []
        statement = _set(former.id, metadata=stored.public, secrets=stored.secrets, **changes)
        check_name(former.type, changes.get("name", former.name))
        return await self._write_named(
            connection, statement, former.owner, former.type, changes.get("name", former.name)
        )

    async def _write_named(
        self, connection: AsyncConnection, statement: Any, owner: str, passport_type: PassportType, name: str
    ) -> Passport:
        try:
            async with connection.begin_nested():
                rows = await connection.execute(statement.returning(passports))
                return read_passport(rows.mappings().one())
        except IntegrityError as error:
            if constraint_of(error) != "passports_name_in_use_key":
                raise
        existing = await connection.scalar(
            select(passports.c.id).where(
                passports.c.owner == owner,
                passports.c.type == passport_type.value,
                passports.c.name == name,
                passports.c.status != PassportStatus.REVOKED.value,
                passports.c.deregistered_at.is_(None),
            )
        )
        raise PassportExists(str(existing), passport_type.value, name)

    async def _lock(self, connection: AsyncConnection, passport_id: str, sees: str | None) -> RowMapping:
        row = None
        if ids_are_uuids(passport_id):
            rows = await connection.execute(select(passports).where(passports.c.id == passport_id).with_for_update())
            row = rows.mappings().one_or_none()
        if row is None or (sees is not None and row["owner"] != sees and row["type"] != PassportType.MODEL):
            raise PassportNotFound(passport_id)
        if sees is not None and row["owner"] != sees:
            message = "Only its owner or an admin may change this model's passport."
            raise Forbidden(message)
        return row

    async def _get(self, connection: AsyncConnection, passport_id: str) -> Passport:
        row = None
        if ids_are_uuids(passport_id):
            rows = await connection.execute(select(passports).where(passports.c.id == passport_id))
            row = rows.mappings().one_or_none()
        if row is None:
            raise PassportNotFound(passport_id)
        return read_passport(row)


def _upstream_of(stored: StoredMetadata) -> tuple[Any, Any]:
    return stored.public.get("upstream"), stored.secrets.get("upstreamApiKey")


def _set(passport_id: str, **changes: Any) -> Any:
    """Answer an UPDATE of one passport that the feed will notice."""
    return (
        update(passports)
        .where(passports.c.id == passport_id)
        .values(
            updated_at=func.now(),
            revision=passports.c.revision + 1,
            changed_xid=func.pg_current_xact_id(),
            **changes,
        )
        .returning(passports)
    )


def _refuse_fixed(former: Passport, patch: Mapping[str, Any]) -> None:
    if former.status is PassportStatus.REVOKED:
        raise InvalidRequest.at("status", "This passport is revoked, for good. Register it again with POST /passports.")
    for field, fixed in (("type", former.type.value), ("owner", former.owner)):
        if field in patch and patch[field] != fixed:
            raise InvalidRequest.at(field, f"A passport's {field} is fixed; it stays {fixed!r}. Leave it out.")
    for field in ("name", "status"):
        if field in patch and patch[field] is None:
            raise InvalidRequest.at(field, "It can't be removed. Send another value, or leave it out.")


def _comparable(passport: Passport, stored: StoredMetadata) -> dict[str, Any]:
    """Answer what the audit trail hashes: all that can change, secrets among it."""
    return {
        "name": passport.name,
        "description": passport.description,
        "version": passport.version,
        "tags": list(passport.tags),
        "status": passport.status.value,
        "metadata": stored.public,
        "secrets": stored.secrets,
    }
