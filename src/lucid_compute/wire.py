"""What every request and response shares: scalar types, base shapes, validation faults, paging, sorting, and back-off.

Scalar types are strict where Pydantic would convert, and bounded by what Postgres can store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_MONEY_EXAMPLE = "a decimal number such as 0.002 or '0.002', with at most 12 decimals"
_MONEY_LIMIT = Decimal(1_000_000)
_MONEY_DECIMALS = 12
_MONEY_TEXT = re.compile(r"[0-9]{1,7}(\.[0-9]{1,12})?")
_SIGNED_TEXT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?", re.ASCII)
_EXACT_FLOAT_DIGITS = 15
_MAX_DOUBLINGS = 60  # enough for any limit, and within the range of a float


def write_instant(instant: datetime) -> str:
    """Return RFC 3339 in UTC with milliseconds, the format of every instant in a response."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read_instant(value: Any) -> Any:
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        message = "Send an RFC 3339 instant with its time zone, such as 2026-01-31T12:00:00.000Z."
        raise ValueError(message)
    return value.upper()


def _read_day(value: Any) -> Any:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _DAY.fullmatch(value):
        message = "Send a day in UTC such as 2026-01-31."
        raise ValueError(message)
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        message = "Send an instant between the years 1 and 9999 in UTC."
        raise ValueError(message) from error


def _read_whole(value: Any) -> Any:
    """Return 3.0 as 3: JSON Schema counts it as an integer. Heartbeats do the same without a call, for speed."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_money(value: Any) -> Decimal:
    """Return exact US dollars from a number or a decimal string.

    Raises:
        ValueError: `value` is neither, is negative, or has more digits than are stored.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        message = f"Send {_MONEY_EXAMPLE}."
        raise ValueError(message)  # noqa: TRY004 - Pydantic turns a ValueError into a field fault, a TypeError into a 500
    if isinstance(value, float) and len(Decimal(str(value)).as_tuple().digits) > _EXACT_FLOAT_DIGITS:
        raise ValueError("A number of so many digits is not exact in JSON. Send it as text.")
    if isinstance(value, str) and not _MONEY_TEXT.fullmatch(value):
        message = f"Send {_MONEY_EXAMPLE}."
        raise ValueError(message)
    try:
        amount = Decimal(str(value))
    except InvalidOperation as error:
        message = f"Send {_MONEY_EXAMPLE}."
        raise ValueError(message) from error
    if not amount.is_finite() or amount < 0 or amount > _MONEY_LIMIT:
        message = f"Send an amount from 0 to {_MONEY_LIMIT}."
        raise ValueError(message)
    if -int(amount.as_tuple().exponent) > _MONEY_DECIMALS:
        message = f"Send {_MONEY_EXAMPLE}."
        raise ValueError(message)
    return amount


def _read_signed_money(value: Any) -> Decimal:
    """Return exact US dollars, below 0 too, from a decimal string: a number might not be exact.

    Raises:
        ValueError: `value` is no such string, is 0, or has more digits than are stored.
    """
    if isinstance(value, Decimal):
        return value
    if not isinstance(value, str) or not (amount := _read_unsigned(value.removeprefix("-"))):
        message = "Send text such as '-12.5': not 0, with at most 12 decimals."
        raise ValueError(message)
    return -amount if value.startswith("-") else amount


def _read_unsigned(text: str) -> Decimal | None:
    return Decimal(text) if _SIGNED_TEXT.fullmatch(text) else None


def write_money(amount: Decimal) -> str:
    """Return the amount without an exponent, with as many decimals as were sent."""
    return format(amount, "f")


Instant = Annotated[
    datetime,
    BeforeValidator(_read_instant),
    AfterValidator(_to_utc),
    PlainSerializer(write_instant, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-01-31T12:00:00.000Z"]}),
]
Day = Annotated[date, BeforeValidator(_read_day)]
Count = Annotated[int, Strict(), Field(ge=0, le=INT64_MAX)]
PositiveCount = Annotated[int, Strict(), Field(ge=1, le=INT32_MAX), BeforeValidator(_read_whole)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, le=1e15, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
SignedMoney = Annotated[
    Decimal,
    BeforeValidator(_read_signed_money),
    PlainSerializer(write_money, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^-?(?=.*[1-9])[0-9]{1,12}(\.[0-9]{1,12})?$",
            "description": "US dollars, kept exactly; below 0 it is taken back; never 0.",
            "examples": ["-12.5"],
        }
    ),
]
Money = Annotated[
    Decimal,
    BeforeValidator(read_money),
    PlainSerializer(write_money, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1_000_000, "multipleOf": 1e-12},
                {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,12})?$"},
            ],
            "description": "US dollars, kept exactly; answered as a string.",
            "examples": ["0.002"],
        }
    ),
]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=4000)]
Label = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", min_length=1, max_length=200)]
MAX_MODEL_ID = 512  # such as the path of a file, which several servers use as a model's id
ModelId = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", min_length=1, max_length=MAX_MODEL_ID)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", min_length=1, max_length=200)]


def backoff_seconds(
    failures: int, *, first_seconds: float, longest_seconds: float = math.inf, jitter: float = 1.0
) -> float:
    """Return the seconds to wait after `failures` in a row, counted from 1.

    The pause is `first_seconds` after one failure, doubles with each further one up to `longest_seconds`, and is then
    multiplied by `jitter`.
    """
    doublings = min(max(failures - 1, 0), _MAX_DOUBLINGS)
    return min(first_seconds * 2.0**doublings, longest_seconds) * jitter


class WireShape(BaseModel):
    """The base of requests: camelCase in JSON, snake_case in Python, frozen, unknown fields rejected."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, extra="forbid", serialize_by_alias=True)


class ForgivingShape(WireShape):
    """A request that ignores unknown fields, so that newer senders work with an older service."""

    model_config = ConfigDict(extra="ignore")


class ResponseShape(WireShape):
    """The base of responses, created by their Python names."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)


class FieldFault(NamedTuple):
    """One fault of a request: where it is (`metadata.vram`, `query.page`) and what to send instead."""

    path: str
    message: str


MAX_FAULTS = 100  # listed of one request
_PATH_CHARACTERS = 200
_SENTENCE_CHARACTERS = 500


def faults_from(errors: Sequence[Mapping[str, Any]], *prefix: str) -> list[FieldFault]:
    """Return Pydantic's error list as field faults, each with what to send; the first MAX_FAULTS of them."""
    return [FieldFault(_path(prefix, error["loc"]), _sentence(error)) for error in errors[:MAX_FAULTS]]


def _path(prefix: tuple[str, ...], loc: Sequence[Any]) -> str:
    """Return a dotted path, without the names that Pydantic gives the branches of a union."""
    parts = [str(part)[:_PATH_CHARACTERS] for part in loc if not _is_branch(part)]
    return ".".join([*prefix, *parts])[:_PATH_CHARACTERS]


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in _UNION_BRANCHES or "[" in part or "(" in part)


def _sentence(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    message = str(error["msg"]).removeprefix("Value error, ")[:_SENTENCE_CHARACTERS]
    return message if message.endswith(".") else f"{message}."


_UNION_BRANCHES = frozenset({"constrained-str", "constrained-float", "RuntimeDescription", "float", "str"})
_SENTENCES = {
    "missing": "Required: send it.",
    "extra_forbidden": "Unknown field: leave it out, or correct its name.",
    "string_pattern_mismatch": "Send text without control characters.",
}
DEFAULT_PER_PAGE = 20
MAX_PER_PAGE = 100


class Pagination(ResponseShape):
    """The position of a page in the complete list; pages are counted from 1."""

    total: int
    page: int
    per_page: int
    total_pages: int


class SortBy(StrEnum):
    """What a list is ordered by."""

    CREATED_AT = "createdAt"
    UPDATED_AT = "updatedAt"
    NAME = "name"


class NodeSortBy(StrEnum):
    """What a list of nodes is ordered by: like any list, or by the current state of its nodes."""

    CREATED_AT = "createdAt"
    UPDATED_AT = "updatedAt"
    NAME = "name"
    LOAD = "load"
    QUEUE_DEPTH = "queueDepth"
    IN_FLIGHT = "inFlight"
    HEARTBEAT_AT = "heartbeatAt"
    SEVERITY = "severity"


class ModelSortBy(StrEnum):
    """What a list of models is ordered by: like any list, or by whether they can be run and reached right now."""

    CREATED_AT = "createdAt"
    UPDATED_AT = "updatedAt"
    NAME = "name"
    SEVERITY = "severity"


class SortOrder(StrEnum):
    """Which end comes first."""

    ASCENDING = "asc"
    DESCENDING = "desc"
