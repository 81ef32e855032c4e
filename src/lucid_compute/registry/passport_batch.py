"""Many registrations in one transaction: a few statements write them all, and each one succeeds or fails for itself."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import delete, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import LucidError, ModelNameTaken, Overloaded, PassportExists
from lucid_compute.postgres.tables import model_names as names_in_use
from lucid_compute.postgres.tables import passports
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.domain.metadata import StoredMetadata
from lucid_compute.registry.domain.passports import (
    NewPassport,
    Passport,
    PassportStatus,
    PassportType,
    model_names,
)
from lucid_compute.registry.events import record_registrations
from lucid_compute.registry.fleet.rows import read_passport
from lucid_compute.registry.keys.audit import Change, record_changes
from lucid_compute.registry.locks import add_node_rows
from lucid_compute.registry.passport_quota import PassportQuota

ROUNDS = 3  # a passport that only another refused passport of the call was in the way of is tried again

# The rows are inserted in the order of `drafts`. Two transactions that insert the same names in the same order wait for
# each other, and never in a circle.
_READ = [column for column in passports.c if column.name not in {"secrets", "changed_xid"}]
_INSERT = text(f"""
    INSERT INTO passports (id, type, owner, name, description, version, tags, metadata, secrets)
    SELECT id, type, owner, name, description, version, tags, metadata, secrets
    FROM jsonb_to_recordset(CAST(:drafts AS jsonb)) AS draft (
        id uuid, type text, owner text, name text, description text, version text, tags text[], metadata jsonb,
        secrets jsonb
    )
    ON CONFLICT DO NOTHING
    RETURNING {", ".join(column.name for column in _READ)}
""").columns(*_READ)
_CLAIM_NAMES = text("""
    INSERT INTO model_names (name, passport_id)
    SELECT * FROM unnest(CAST(:names AS text[]), CAST(:ids AS uuid[]))
    ON CONFLICT DO NOTHING RETURNING name, passport_id
""").columns(names_in_use.c.name, names_in_use.c.passport_id)
_FIND_IN_USE = text("""
    SELECT p.id, p.type, p.owner, p.name
    FROM unnest(CAST(:types AS text[]), CAST(:owners AS text[]), CAST(:names AS text[])) AS wanted (type, owner, name)
    JOIN passports p USING (owner, type, name) WHERE p.status <> 'revoked' AND p.deregistered_at IS NULL
""").columns(passports.c.id, passports.c.type, passports.c.owner, passports.c.name)


class Draft(NamedTuple):
    """A passport whose metadata was checked. `position` is its place in the call."""

    position: int
    id: str
    new: NewPassport
    stored: StoredMetadata

    def values(self) -> dict[str, Any]:
        """Return the values of its row."""
        return {
            "name": self.new.name,
            "description": self.new.description,
            "version": self.new.version,
            "tags": self.new.tags,
            "metadata": self.stored.public,
            "secrets": self.stored.secrets,
        }

    @property
    def key(self) -> tuple[str, str, str]:
        """What no two passports in use share: owner, type and name."""
        return self.new.owner, self.new.type.value, self.new.name


@dataclass(slots=True)
class BatchOutcome:
    """What became of the passports of a call, by their positions."""

    made: dict[int, Passport] = field(default_factory=dict)
    refused: dict[int, LucidError] = field(default_factory=dict)

    def leaves_open(self, draft: Draft) -> bool:
        """Return whether nothing was decided about the draft yet."""
        return draft.position not in self.made and draft.position not in self.refused


async def write_batch(
    connection: AsyncConnection, actor: Actor, drafts: Iterable[Draft], quota: PassportQuota
) -> BatchOutcome:
    """Insert the passports in the connection's transaction, with the rows of nodes, events and the audit trail.

    Of two that exclude each other the first gets its name, as if they were sent one after the other.
    """
    outcome = BatchOutcome()
    pending = sorted(drafts, key=lambda draft: (draft.key, draft.position))
    for left in reversed(range(ROUNDS)):
        await _write_round(connection, pending, quota, outcome, is_last=left == 0)
        if not (pending := [draft for draft in pending if outcome.leaves_open(draft)]):
            break
    for draft in pending:
        message = f"Another registration of {draft.new.name!r} has not ended. Send this one again."
        outcome.refused[draft.position] = Overloaded(message, retry_after_seconds=1)
    await _record(connection, actor, [draft for draft in drafts if draft.position in outcome.made])
    return outcome


async def _write_round(
    connection: AsyncConnection, pending: Sequence[Draft], quota: PassportQuota, outcome: BatchOutcome, *, is_last: bool
) -> None:
    rows = [{"id": draft.id, "type": draft.new.type, "owner": draft.new.owner, **draft.values()} for draft in pending]
    written = await connection.execute(_INSERT, {"drafts": json.dumps(rows)})
    by_id = {str(row["id"]): read_passport(row) for row in written.mappings()}
    made = {draft.position: by_id[draft.id] for draft in pending if draft.id in by_id}
    await _claim_names(connection, made, outcome, is_last=is_last)
    await _apply_quota(connection, made, quota, outcome)
    outcome.made |= made
    await _find_in_use(connection, [draft for draft in pending if draft.id not in by_id], outcome)


async def _claim_names(
    connection: AsyncConnection, made: dict[int, Passport], outcome: BatchOutcome, *, is_last: bool
) -> None:
    """Claim the names of the new models; remove those that do not get all of theirs from `made`, and their rows.

    One whose names only such a model of this call had is left open, unless `is_last`.
    """
    wanted = sorted((name, position) for position, passport in made.items() for name in model_names(passport))
    if not wanted:
        return
    arguments = {"names": [name for name, _ in wanted], "ids": [made[position].id for _, position in wanted]}
    rows = await connection.execute(_CLAIM_NAMES, arguments)
    holders = {name: str(passport_id) for name, passport_id in rows}
    missing: dict[int, list[str]] = defaultdict(list)
    for name, position in wanted:
        if holders.get(name) != made[position].id:
            missing[position].append(name)
    losers = {made[position].id for position in missing}
    for position, names in missing.items():
        if is_last or not all(holders.get(name) in losers for name in names):
            outcome.refused[position] = ModelNameTaken(min(names))
    await _remove(connection, made, missing)


async def _apply_quota(
    connection: AsyncConnection, made: dict[int, Passport], quota: PassportQuota, outcome: BatchOutcome
) -> None:
    """Refuse the last of an owner's new passports if they are too many: remove them from `made`, and their rows."""
    of_owner: dict[str, list[int]] = defaultdict(list)
    for position, passport in made.items():
        of_owner[passport.owner].append(position)
    for owner, positions in sorted(of_owner.items()):
        if excess := await quota.find_excess(connection, owner, len(positions)):
            too_many = sorted(positions)[-excess.passports :]
            outcome.refused |= dict.fromkeys(too_many, excess.error)
            await _remove(connection, made, too_many)


async def _remove(connection: AsyncConnection, made: dict[int, Passport], positions: Iterable[int]) -> None:
    """Delete passports that this transaction has inserted, with the names that they claimed."""
    if ids := [made.pop(position).id for position in positions]:
        await connection.execute(delete(names_in_use).where(names_in_use.c.passport_id.in_(ids)))
        await connection.execute(delete(passports).where(passports.c.id.in_(ids)))


async def _find_in_use(connection: AsyncConnection, drafts: Sequence[Draft], outcome: BatchOutcome) -> None:
    """Refuse the drafts whose name another passport has. One whose passport has just ended is left open."""
    if not drafts:
        return
    owners, types, names = zip(*(draft.key for draft in drafts), strict=True)
    rows = await connection.execute(_FIND_IN_USE, {"types": list(types), "owners": list(owners), "names": list(names)})
    in_use = {(row["owner"], row["type"], row["name"]): str(row["id"]) for row in rows.mappings()}
    for draft in drafts:
        if (passport_id := in_use.get(draft.key)) is not None:
            error = PassportExists(passport_id, draft.new.type.value, draft.new.name)
            outcome.refused[draft.position] = error


async def _record(connection: AsyncConnection, actor: Actor, made: Sequence[Draft]) -> None:
    if nodes := [draft.id for draft in made if draft.new.type is PassportType.COMPUTE]:
        await add_node_rows(connection, nodes)
        await record_registrations(connection, nodes)
    if made:
        status = PassportStatus.ACTIVE.value
        changes = (
            Change("passport.create", draft.new.type.value, draft.id, after={**draft.values(), "status": status})
            for draft in sorted(made, key=attrgetter("position"))
        )
        await record_changes(connection, actor, changes)
