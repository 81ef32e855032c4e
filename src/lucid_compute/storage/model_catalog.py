"""The namespace of models: names and aliases of active ones, unique over all owners."""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import ModelNameTaken
from lucid_compute.passports import Passport, model_names
from lucid_compute.storage import tables


async def take_names(connection: AsyncConnection, model: Passport) -> None:
    """Give an active model its names; anything else has none.

    Raises:
        ModelNameTaken: another model has one of them.
    """
    if not (names := model_names(model)):
        return
    rows = [{"name": name, "passport_id": model.id} for name in sorted(names)]
    statement = insert(tables.model_names).values(rows).on_conflict_do_nothing().returning(tables.model_names.c.name)
    taken = set(await connection.scalars(statement))
    if missed := set(names) - taken:
        raise ModelNameTaken(min(missed))


async def release_names(connection: AsyncConnection, model: Passport) -> None:
    """Free the model's names."""
    if model_names(model):
        await connection.execute(delete(tables.model_names).where(tables.model_names.c.passport_id == model.id))
