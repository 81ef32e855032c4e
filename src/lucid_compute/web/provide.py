"""Dependency injection by type: `fleet: Provided[Fleet]` gives a route the `Fleet` of its replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request

Part = TypeVar("Part")


def provide(app: FastAPI, *parts: object) -> None:
    """Let the routes of `app` ask for each of these parts by its exact type."""
    app.state.parts = {type(part): part for part in parts}


class _PartOf:
    """A dependency that returns the replica's part of one type."""

    def __init__(self, kind: type[Any]) -> None:
        self._kind = kind

    async def __call__(self, request: Request) -> Any:
        return request.app.state.parts[self._kind]


if TYPE_CHECKING:
    Provided = Annotated[Part, "filled in by the replica"]
else:

    class Provided:
        """The type of a parameter that the replica fills in."""

        def __class_getitem__(cls, kind: type[Any]) -> Any:
            """Return `kind`, with the dependency that finds the part."""
            return Annotated[kind, Depends(_PartOf(kind))]
