"""Describe each call once: what to send, the type of the result, whether it may be repeated. Pure, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from operator import attrgetter
from typing import Any, Generic, TypeVar, get_args
from urllib.parse import quote
from uuid import uuid4

from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from lucid_compute import errors as ground
from lucid_compute.client.errors import InvalidRequest
from lucid_compute.wire import FieldFault, WireShape, faults_from, write_instant

T = TypeVar("T")
PageShape = TypeVar("PageShape")
QueryValue = str | int | float | bool | datetime | date | list[str] | tuple[str, ...] | None
Query = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiCall(Generic[T]):
    """A request to the service, and the type of its result.

    `path` is quoted. `is_repeatable`: sending it twice has the effect of sending it once. `waits_seconds` is how long
    the service may take on purpose. `is_done_when_missing`: a 404 to a repetition means that the first request did the
    work.
    """

    method: str
    path: str
    answer: type[T]
    query: Query = ()
    body: bytes | None = None
    is_repeatable: bool = True
    idempotency_key: str | None = None
    waits_seconds: float = 0.0
    is_done_when_missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCall(Generic[PageShape, T]):
    """A list of the service; each of its pages is a call. `identity` recognises an item that moved to another page."""

    path: str
    answer: type[PageShape]
    items: Callable[[PageShape], list[T]]
    query: Query = ()
    identity: Callable[[T], Hashable] = field(default=attrgetter("id"))

    def page(self, number: int, per_page: int) -> ApiCall[PageShape]:
        """Return the call for one page; pages count from 1."""
        query = (*self.query, *query_of(page=number, per_page=per_page))
        return ApiCall(method="GET", path=self.path, query=query, answer=self.answer)


def path_of(*parts: str) -> str:
    """Return a path of quoted parts. Slashes and dots of names are quoted too.

    Raises:
        InvalidRequest: a part is empty, so the path would be another route's.
    """
    for part in parts:
        if not part:
            raise refuse("path", "An id or a name is empty. Pass the one that you mean.")
    return "".join(f"/{_quote(part)}" for part in parts)


def query_of(**values: QueryValue) -> Query:
    """Return a query with the names of the wire. None is left out; a list becomes a repeated parameter."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if value is not None:
            each = value if isinstance(value, list | tuple) else [value]
            pairs += [(to_camel(name), _text(name, item)) for item in each]
    return tuple(pairs)


def body_of(shape: type[WireShape], /, **fields: Any) -> bytes:
    """Return the JSON body of a shape. Fields may have Python's names or the wire's camelCase names.

    Raises:
        InvalidRequest: with every fault, in the names of the wire, as the service reports them; nothing was sent.
    """
    try:
        return write(shape.model_validate(fields, by_name=True, by_alias=True))
    except ValidationError as error:
        found = [{**fault, "loc": _on_the_wire(shape, fault["loc"])} for fault in error.errors(include_url=False)]
        raise _invalid(faults_from(found)) from None


def write(request: WireShape) -> bytes:
    """Return the JSON body of a request, without fields that were not set."""
    try:
        return request.model_dump_json(by_alias=True, exclude_unset=True).encode()
    except PydanticSerializationError:
        raise refuse(
            "body", "It holds a value that JSON has no word for. Send text, numbers, lists and dicts."
        ) from None


def given(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def checked_key(idempotency_key: str | None) -> str:
    """Return the caller's idempotency key, or a new one.

    Raises:
        InvalidRequest: the key can't be a header.
    """
    key = idempotency_key or str(uuid4())
    if not key.isascii() or not key.isprintable() or " " in key:
        raise refuse("idempotencyKey", "Pass visible ASCII characters alone, at most 255.")
    return key


def refuse(path: str, message: str) -> InvalidRequest:
    """Return the error for one invalid field, before anything is sent."""
    return _invalid([FieldFault(path, message)])


def _invalid(faults: list[FieldFault]) -> InvalidRequest:
    refusal = ground.InvalidRequest(faults)
    return InvalidRequest(refusal.message, details=refusal.details, is_certainly_undone=True)


def _on_the_wire(annotation: Any, loc: Iterable[int | str]) -> list[int | str]:
    """Return the place of a fault in the wire's names. A part that is no field, such as a metadata key, stays."""
    names: list[int | str] = []
    for part in loc:
        known = _fields_of(annotation).get(part)
        names.append(part if known is None else known.alias or part)
        annotation = annotation if known is None else known.annotation
    return names


def _fields_of(annotation: Any) -> dict[int | str | None, FieldInfo]:
    """Return the fields of the shapes in an annotation, by their Python names and their wire names."""
    if isinstance(annotation, type) and issubclass(annotation, WireShape):
        return {key: known for name, known in annotation.model_fields.items() for key in (name, known.alias)}
    return {key: known for inner in get_args(annotation) for key, known in _fields_of(inner).items()}


def _quote(part: str) -> str:
    try:
        return quote(part, safe="").replace(".", "%2E") if part.strip(".") == "" else quote(part, safe="")
    except UnicodeEncodeError:
        raise refuse("path", "An id or a name is no valid text. Pass the one that you mean.") from None


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise refuse(f"query.{to_camel(name)}", "Pass an instant with its time zone, such as datetime.now(UTC).")
        return write_instant(value)
    return value.value if isinstance(value, StrEnum) else str(value)
