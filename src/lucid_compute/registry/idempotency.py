"""Idempotency keys: a request sent again is answered as the first time, one sent at the same time waits for it."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import IdempotencyConflict
from lucid_compute.postgres.tables import idempotency_keys

KEPT_HOURS = 24


class Idempotency(NamedTuple):
    """An `Idempotency-Key` and a hash of the body that it came with."""

    key: str
    body_hash: bytes

    async def claim(self, connection: AsyncConnection, owner: str) -> str | None:
        """Take the key for this transaction; return the id that it made before, None when it is new.

        A request with the same key that is still running is waited for: the row's lock is its transaction's.

        Raises:
            IdempotencyConflict: the key came with another body before.
        """
        row = insert(idempotency_keys).values(owner=owner, key=self.key, body_hash=self.body_hash)
        claimed = await connection.execute(row.on_conflict_do_nothing().returning(idempotency_keys.c.key))
        if claimed.first() is not None:
            return None
        columns = (idempotency_keys.c.body_hash, idempotency_keys.c.result_id)
        former = await connection.execute(select(*columns).where(*self._where(owner)))
        body_hash, result_id = former.one()
        if body_hash != self.body_hash:
            raise IdempotencyConflict(self.key)
        return str(result_id)

    async def keep(self, connection: AsyncConnection, owner: str, result_id: str) -> None:
        """Note what the key made."""
        await connection.execute(update(idempotency_keys).where(*self._where(owner)).values(result_id=result_id))

    def _where(self, owner: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        return idempotency_keys.c.owner == owner, idempotency_keys.c.key == self.key
