"""Passports in Postgres: create, change, revoke and search them. Each change and its audit row share a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4, uuid5

from sqlalchemy import ColumnElement, RowMapping, Select, and_, collate, delete, or_, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.errors import Forbidden, InvalidRequest, LucidError, ModelNameTaken, Overloaded, PassportExists
from lucid_compute.postgres import tables
from lucid_compute.postgres.changes import announce
from lucid_compute.postgres.database import Database, constraint_of
from lucid_compute.postgres.queries import at_least, count_some, in_order
from lucid_compute.postgres.tables import passports
from lucid_compute.registry.departures import Departure, Departures, Drain
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.domain.metadata import (
    StoredMetadata,
    check_name,
    merge_patch,
    read_metadata,
    whole_metadata,
)
from lucid_compute.registry.domain.passports import (
    NewPassport,
    Passport,
    PassportStatus,
    PassportType,
    model_names,
)
from lucid_compute.registry.events import record_event, record_registrations
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.rows import read_passport
from lucid_compute.registry.idempotency import Idempotency
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.registry.locks import add_node_rows, get_passport, lock_passport, update_passport
from lucid_compute.registry.passport_batch import Draft, write_batch
from lucid_compute.registry.passport_quota import PassportQuota
from lucid_compute.web.turns import in_turns
from lucid_compute.wire import SortBy, SortOrder

BATCHES_AT_A_TIME = 2  # of this replica; the pool's other connections are for requests that take milliseconds
BATCH_TIMES = 5.0  # the time limit of a transaction: it writes some 5,000 rows
PASSPORTS_A_TURN = 50  # some milliseconds
_NOTHING_STORED = StoredMetadata({}, {})
_SORT_COLUMNS = {
    SortBy.CREATED_AT: passports.c.created_at,
    SortBy.UPDATED_AT: passports.c.updated_at,
    SortBy.NAME: collate(passports.c.name, "C"),  # the order of lists from the fleet, whatever the server's locale
}


async def claim_names(connection: AsyncConnection, model: Passport) -> None:
    """Claim the name and aliases of an active model in the namespace of all owners. Other passports claim none.

    Raises:
        ModelNameTaken: another model has one of them.
    """
    if not (names := model_names(model)):
        return
    rows = [{"name": name, "passport_id": model.id} for name in sorted(names)]
    statement = insert(tables.model_names).values(rows).on_conflict_do_nothing().returning(tables.model_names.c.name)
    claimed = set(await connection.scalars(statement))
    if taken := set(names) - claimed:
        raise ModelNameTaken(min(taken))


async def release_names(connection: AsyncConnection, model: Passport) -> None:
    """Free the model's name and aliases."""
    if model_names(model):
        await connection.execute(delete(tables.model_names).where(tables.model_names.c.passport_id == model.id))


@dataclass(frozen=True, slots=True)
class PassportSearch:
    """The criteria of a list of passports and the page of it; None matches all. A passport must have all of `tags`."""

    owner: str | None
    type: str | None
    status: str | None
    tags: tuple[str, ...]
    text: str | None
    sort_by: SortBy
    sort_order: SortOrder
    offset: int
    limit: int

    def condition(self) -> ColumnElement[bool]:
        """Return the WHERE clause."""
        conditions: list[ColumnElement[bool]] = [true()]
        for column, value in (
            (passports.c.owner, self.owner),
            (passports.c.type, self.type),
            (passports.c.status, self.status),
        ):
            if value is not None:
                conditions.append(column == value)
        if self.tags:
            conditions.append(passports.c.tags.contains(list(self.tags)))
        if self.text:
            columns = (passports.c.name, passports.c.description)
            conditions.append(or_(*(column.icontains(self.text, autoescape=True) for column in columns)))
        return and_(*conditions)

    def page(self) -> Select[Any]:
        """Return the SELECT of the page, in a total order."""
        order = in_order(_SORT_COLUMNS, passports.c.id, self.sort_by, self.sort_order)
        return select(passports).where(self.condition()).order_by(*order).offset(self.offset).limit(self.limit)


class PassportStore:
    """The only writer of passports."""

    def __init__(self, database: Database, fleet: Fleet, egress: EgressPolicy, quota: PassportQuota) -> None:
        """Changes are applied to `fleet` at once; `egress` checks the URLs of providers."""
        self._database = database
        self._fleet = fleet
        self._egress = egress
        self._quota = quota
        self._departures = Departures(database, fleet)
        self._batches = asyncio.Semaphore(BATCHES_AT_A_TIME)

    async def create(
        self, actor: Actor, new: NewPassport, *, is_admin: bool, idempotency: Idempotency | None = None
    ) -> Passport:
        """Create a passport; a compute passport is a node from then on, without a heartbeat.

        Raises:
            InvalidRequest: its metadata is not valid, or its owner has as many passports as an owner may have.
            Forbidden: its metadata names an upstream, and the actor is no admin.
            PassportExists, ModelNameTaken: the name is in use.
            IdempotencyConflict: the key was used with another body.
        """
        check_name(new.type, new.name)
        stored = self._read_metadata(new.type, new.metadata, is_admin=is_admin)
        async with self._database.transaction() as connection:
            if idempotency and (created := await idempotency.claim(connection, new.owner)):
                return await get_passport(connection, created)
            passport = await self._insert(connection, new, stored)
            if idempotency:
                await idempotency.record_result(connection, new.owner, passport.id)
            await claim_names(connection, passport)
            if new.type is PassportType.COMPUTE:
                await add_node_rows(connection, [passport.id])
                await record_registrations(connection, [passport.id])
            change = Change("passport.create", new.type.value, passport.id, after=_comparable(passport, stored))
            await record_change(connection, actor, change)
            await self._quota.check(connection, new.owner)  # last: registrations of one owner may wait for each other
            await announce(connection)
        self._show(passport, stored)
        return passport

    async def create_many(
        self,
        actor: Actor,
        wanted: Sequence[NewPassport | LucidError],
        *,
        is_admin: bool,
        idempotency: Idempotency | None = None,
    ) -> list[Passport | LucidError]:
        """Create passports in one transaction; return for each the passport, or the error of `create`.

        An error among `wanted` is returned in its place. With `idempotency`, a repeat returns what the first call
        created, and tries again what was refused.

        Raises:
            IdempotencyConflict: the key was used with another body.
            Overloaded: too many such calls run.
        """
        results: list[Any] = []
        checked: dict[int, tuple[NewPassport, StoredMetadata]] = {}
        async for new in in_turns(wanted, PASSPORTS_A_TURN):
            results.append(self._check_new(new, is_admin=is_admin))
            if not isinstance(results[-1], LucidError):
                checked[len(results) - 1] = results[-1]
        async with self._turn_of_batch(), self._database.transaction(times=BATCH_TIMES) as connection:
            batch_id, is_repeat = await _claim_batch(connection, actor, idempotency)
            drafts = [Draft(position, str(uuid5(batch_id, str(position))), *new) for position, new in checked.items()]
            known = await _find_made(connection, drafts) if is_repeat else {}
            new_drafts = [draft for draft in drafts if draft.position not in known]
            outcome = await write_batch(connection, actor, new_drafts, self._quota)
            await announce(connection)
        async for draft in in_turns(new_drafts, PASSPORTS_A_TURN):
            if (passport := outcome.made.get(draft.position)) is not None:
                self._show(passport, draft.stored)
        for position, result in {**known, **outcome.made, **outcome.refused}.items():
            results[position] = result
        return results

    def _check_new(
        self, new: NewPassport | LucidError, *, is_admin: bool
    ) -> LucidError | tuple[NewPassport, StoredMetadata]:
        if isinstance(new, LucidError):
            return new
        try:
            check_name(new.type, new.name)
            return new, self._read_metadata(new.type, new.metadata, is_admin=is_admin)
        except LucidError as error:
            return error

    @asynccontextmanager
    async def _turn_of_batch(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._database.timeout_seconds):
                await self._batches.acquire()
        except TimeoutError:
            message = f"{BATCHES_AT_A_TIME} calls with many passports run here already. Retry in 1 s."
            raise Overloaded(message, retry_after_seconds=1) from None
        try:
            yield
        finally:
            self._batches.release()

    async def change(
        self, actor: Actor, passport_id: str, patch: Mapping[str, Any], *, visible_owner: str | None
    ) -> Passport:
        """Apply an RFC 7396 merge patch; `visible_owner` is the only owner whose passports may be changed, None is any.

        Raises:
            PassportNotFound: there is no such passport.
            InvalidRequest: the patched passport is not valid, or is revoked already.
            Forbidden: it is another owner's model, or the patch changes an upstream and the actor is no admin.
            PassportExists, ModelNameTaken: the new name is in use.
            RequestsInFlight: the patch revokes a node that requests run on.
        """
        if patch.get("status") != PassportStatus.REVOKED:
            return await self._change(actor, passport_id, patch, visible_owner, None)
        departure = Departure(actor, passport_id, visible_owner, "revoking")
        return await self._departures.run(
            departure, lambda drain: self._change(actor, passport_id, patch, visible_owner, drain)
        )

    async def _change(
        self, actor: Actor, passport_id: str, patch: Mapping[str, Any], visible_owner: str | None, drain: Drain | None
    ) -> Passport:
        async with self._database.transaction() as connection:
            row = await lock_passport(connection, passport_id, visible_owner)
            previous = read_passport(row)
            ended = await self._departures.end_drain(connection, drain)
            _refuse_fixed(previous, patch)
            stored = self._merge(row, patch, is_admin=visible_owner is None)
            passport = await self._update(connection, previous, patch, stored)
            await release_names(connection, previous)
            await claim_names(connection, passport)
            if previous.type is PassportType.COMPUTE:
                revoked = passport.status is PassportStatus.REVOKED
                await record_event(connection, passport_id, EventType.REVOKED if revoked else EventType.UPDATED)
            before = _comparable(previous, StoredMetadata(row["metadata"], row["secrets"]))
            after = _comparable(passport, stored)
            change = Change("passport.change", previous.type.value, passport_id, before, after)
            await record_change(connection, actor, change)
            await announce(connection)
        self._show(passport, stored)
        self._departures.apply(ended)
        return passport

    async def revoke(self, actor: Actor, passport_id: str, *, visible_owner: str | None) -> None:
        """Revoke a passport, which is final; it stays readable, and its name is free again.

        Raises:
            PassportNotFound: there is no such passport.
            RequestsInFlight: requests run on the node.
        """
        departure = Departure(actor, passport_id, visible_owner, "revoking")
        await self._departures.run(departure, lambda drain: self._revoke(actor, passport_id, visible_owner, drain))

    async def _revoke(self, actor: Actor, passport_id: str, visible_owner: str | None, drain: Drain | None) -> None:
        async with self._database.transaction() as connection:
            previous = read_passport(await lock_passport(connection, passport_id, visible_owner))
            if previous.status is PassportStatus.REVOKED:
                return
            ended = await self._departures.end_drain(connection, drain)
            row = await connection.execute(update_passport(passport_id, status=PassportStatus.REVOKED.value))
            passport = read_passport(row.mappings().one())
            await release_names(connection, previous)
            if previous.type is PassportType.COMPUTE:
                await record_event(connection, passport_id, EventType.REVOKED)
            await record_change(connection, actor, Change("passport.revoke", previous.type.value, passport_id))
            await announce(connection)
        self._fleet.apply_passport(passport)
        self._departures.apply(ended)

    async def get(self, passport_id: str, *, visible_owner: str | None) -> Passport:
        """Return a passport that is the owner's, or any model's; `visible_owner` None returns any.

        Raises:
            PassportNotFound: there is no such passport, or it is another owner's.
        """
        async with self._database.transaction() as connection:
            return await get_passport(connection, passport_id, visible_owner)

    async def search(self, search: PassportSearch) -> tuple[list[Passport], int]:
        """Return a page of passports, and the number of all that match, up to 100,000."""
        async with self._database.transaction() as connection:
            total = await count_some(connection, passports, search.condition())
            found = [read_passport(row) for row in (await connection.execute(search.page())).mappings()]
            return found, at_least(total, search.offset, len(found), search.limit)

    def _read_metadata(
        self,
        passport_type: PassportType,
        raw: Mapping[str, Any],
        *,
        is_admin: bool,
        known: StoredMetadata = _NOTHING_STORED,
    ) -> StoredMetadata:
        """Check metadata; URLs and the upstream are checked only where they differ from `known`."""
        stored = read_metadata(passport_type, raw)
        if passport_type is PassportType.MODEL and _upstream_of(stored) != _upstream_of(known):
            if not is_admin:
                message = "Only an admin may set, change or remove a model's upstream. Leave metadata.upstream out."
                raise Forbidden(message)
            if upstream := stored.public.get("upstream"):
                self._check_url(upstream["url"], "metadata.upstream.url")
        url = stored.public.get("inferenceUrl")
        if passport_type is PassportType.COMPUTE and url is not None and url != known.public.get("inferenceUrl"):
            self._check_url(url, "metadata.inferenceUrl")
        return stored

    def _check_url(self, url: str, path: str) -> None:
        try:
            self._egress.check_base_url(url)
        except ValueError as error:
            raise InvalidRequest.at(path, str(error)) from None

    def _merge(self, row: RowMapping, patch: Mapping[str, Any], *, is_admin: bool) -> StoredMetadata:
        previous = StoredMetadata(row["metadata"], row["secrets"])
        if "metadata" not in patch:
            return previous
        whole = {} if patch["metadata"] is None else merge_patch(whole_metadata(previous), patch["metadata"])
        return self._read_metadata(PassportType(row["type"]), whole, is_admin=is_admin, known=previous)

    def _show(self, passport: Passport, stored: StoredMetadata) -> None:
        self._fleet.apply_passport(passport)
        if not passport.has_ended:
            self._fleet.secrets.apply(passport.id, passport.revision, stored.secrets)

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
        self, connection: AsyncConnection, previous: Passport, patch: Mapping[str, Any], stored: StoredMetadata
    ) -> Passport:
        changes = {key: value for key, value in patch.items() if key in {"name", "description", "version", "status"}}
        if "tags" in patch:
            changes["tags"] = patch["tags"] or []
        statement = update_passport(previous.id, metadata=stored.public, secrets=stored.secrets, **changes)
        check_name(previous.type, changes.get("name", previous.name))
        return await self._write_named(
            connection, statement, previous.owner, previous.type, changes.get("name", previous.name)
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


async def _claim_batch(connection: AsyncConnection, actor: Actor, idempotency: Idempotency | None) -> tuple[UUID, bool]:
    """Return the id that the ids of the batch's passports are derived from, and whether its key was used before.

    The idempotency key keeps that id, so a repeat finds what the first call created, without a list of it.
    """
    batch_id = uuid4()
    if idempotency is None:
        return batch_id, False
    owner = actor.owner or ""
    if first := await idempotency.claim(connection, owner):
        return UUID(first), True
    await idempotency.record_result(connection, owner, str(batch_id))
    return batch_id, False


async def _find_made(connection: AsyncConnection, drafts: Sequence[Draft]) -> dict[int, Passport]:
    """Return the passports that are there already, by their positions."""
    positions = {draft.id: draft.position for draft in drafts}
    rows = await connection.execute(select(passports).where(passports.c.id.in_(positions)))
    return {positions[str(row["id"])]: read_passport(row) for row in rows.mappings()}


def _upstream_of(stored: StoredMetadata) -> tuple[Any, Any]:
    return stored.public.get("upstream"), stored.secrets.get("upstreamApiKey")


def _refuse_fixed(previous: Passport, patch: Mapping[str, Any]) -> None:
    if previous.status is PassportStatus.REVOKED:
        raise InvalidRequest.at("status", "This passport is revoked, for good. Register it again with POST /passports.")
    for field, fixed in (("type", previous.type.value), ("owner", previous.owner)):
        if field in patch and patch[field] != fixed:
            raise InvalidRequest.at(field, f"A passport's {field} is fixed; it stays {fixed!r}. Leave it out.")
    for field in ("name", "status"):
        if field in patch and patch[field] is None:
            raise InvalidRequest.at(field, "It can't be removed. Send another value, or leave it out.")


def _comparable(passport: Passport, stored: StoredMetadata) -> dict[str, Any]:
    """Return the values that the audit trail hashes: all that can change, including secrets."""
    return {
        "name": passport.name,
        "description": passport.description,
        "version": passport.version,
        "tags": list(passport.tags),
        "status": passport.status.value,
        "metadata": stored.public,
        "secrets": stored.secrets,
    }
