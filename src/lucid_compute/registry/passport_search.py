"""Which passports a list shows, in SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, collate, or_, select, true

from lucid_compute.postgres.queries import in_order
from lucid_compute.postgres.tables import passports
from lucid_compute.wire import SortBy, SortOrder

_SORT_COLUMNS = {
    SortBy.CREATED_AT: passports.c.created_at,
    SortBy.UPDATED_AT: passports.c.updated_at,
    SortBy.NAME: collate(passports.c.name, "C"),  # as the lists that the fleet answers, whatever the server's locale
}


@dataclass(frozen=True, slots=True)
class PassportSearch:
    """What is looked for, and which page of it; None looks for all. `tags` must all be there."""

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
        for column, wanted in (
            (passports.c.owner, self.owner),
            (passports.c.type, self.type),
            (passports.c.status, self.status),
        ):
            if wanted is not None:
                conditions.append(column == wanted)
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
