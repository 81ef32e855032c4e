"""JSON read strictly: what Python's reader would let pass and Postgres or a client could not hold is refused here."""

from __future__ import annotations

import json
import math
from typing import Any

from lucid_compute.errors import FieldFault, InvalidRequest
from lucid_compute.field_types import INT64_MAX

MAX_DEPTH = 64


def read_strictly(body: bytes) -> Any:
    """Answer the value of a JSON text.

    Raises:
        InvalidRequest: 400 when it is not JSON in UTF-8; 422 for NaN and infinities, numbers beyond 64 bits, NUL,
            lone surrogates, a key twice in one object, and nesting deeper than 64.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_read_float,
            parse_int=_read_int,
            object_pairs_hook=_read_object,
        )
        _check(value, "", 0)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise InvalidRequest([FieldFault("", "The body is not UTF-8. Send JSON in UTF-8.")], status=400) from None
    except ValueError as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(
            [FieldFault("", f"The body is not JSON{where}. Send a JSON object.")], status=400
        ) from None
    return value


def _refuse_constant(constant: str) -> Any:
    raise InvalidRequest.at("", f"{constant} is not a JSON number. Send a finite number, or null when it is unknown.")


def _read_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidRequest.at("", f"{digits[:40]} is too large. Send a number of at most 64 bits.")
    return number


def _read_int(digits: str) -> int:
    if len(digits) > 20 or not -INT64_MAX <= (number := int(digits)) <= INT64_MAX:  # noqa: PLR2004 - 64 bits in digits
        raise InvalidRequest.at("", f"{digits[:40]} is too large. Send a number of at most 64 bits.")
    return number


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest.at(_shown(twice), "This key stands twice in one object. Send it once.")
    return found


def _check(value: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path)
            _check(item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _check(item, f"{path}.{position}", depth + 1)


def _check_text(text: str, path: str) -> None:
    if "\x00" in text:
        raise InvalidRequest.at(_shown(path), "Text may not hold NUL. Leave it out.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest.at(
                _shown(path), "Text may not hold half a surrogate pair. Send whole characters."
            ) from None


def _shown(path: str) -> str:
    """Answer a path that can itself be answered."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\u0000")[:200]


def _too_deep() -> InvalidRequest:
    return InvalidRequest.at("", f"The body is nested deeper than {MAX_DEPTH} levels. Send it flatter.")
