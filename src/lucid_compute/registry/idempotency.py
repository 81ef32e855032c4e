"""Idempotency keys: a repeated request gets the result of the first; one sent at the same time waits for it."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import IdempotencyConflict
from lucid_compute.postgres.tables import idempotency_keys

KEPT_HOURS = 24


class Idempotency(NamedTuple):
    """An `Idempotency-Key` and a hash of the body that was sent with it."""

    key: str
    body_hash: bytes

    async def claim(self, connection: AsyncConnection, owner: str) -> str | None:
        """Claim the key in this transaction; return the id that it created before, None when it is new.

        This waits for a running request with the same key, whose transaction holds the row's lock.

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        row = insert(idempotency_keys).values(owner=owner, key=self.key, body_hash=self.body_hash)
        claimed = await connection.execute(row.on_conflict_do_nothing().returning(idempotency_keys.c.key))
        if claimed.first() is not None:
            return None
        columns = (idempotency_keys.c.body_hash, idempotency_keys.c.result_id)
        rows = await connection.execute(select(*columns).where(*self._where(owner)))
        body_hash, result_id = rows.one()
        if body_hash != self.body_hash:
            raise IdempotencyConflict(self.key)
        return str(result_id)

    async def record_result(self, connection: AsyncConnection, owner: str, result_id: str) -> None:
        """Store the id that the request with this key created."""
        await connection.execute(update(idempotency_keys).where(*self._where(owner)).values(result_id=result_id))

    def _where(self, owner: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        return idempotency_keys.c.owner == owner, idempotency_keys.c.key == self.key
