"""A strict JSON reader: it refuses what Python accepts and Postgres or a client can't hold."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from lucid_compute.errors import InvalidRequest
from lucid_compute.wire import INT64_MAX, FieldFault

MAX_DEPTH = 64


def read_strictly(body: bytes) -> Any:
    """Return the value of a JSON text.

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


class _Refused(NamedTuple):
    """Stands for a refused value until `_check` finds it and knows its path."""

    message: str
    key: str | None = None


def _refuse_constant(constant: str) -> _Refused:
    return _Refused(f"{constant} is not a JSON number. Send a finite number, or null when it is unknown.")


def _read_float(digits: str) -> float | _Refused:
    """Return the number; a whole one as an integer, since JSON Schema counts 3.0 as one."""
    number = float(digits)
    if not math.isfinite(number):
        return _too_large(digits)
    return int(number) if number.is_integer() and abs(number) <= INT64_MAX else number


def _read_int(digits: str) -> int | _Refused:
    if len(digits) > 20 or not -INT64_MAX <= (number := int(digits)) <= INT64_MAX:  # noqa: PLR2004 - 64 bits in digits
        return _too_large(digits)
    return number


def _too_large(digits: str) -> _Refused:
    return _Refused(f"{digits[:40]} is too large. Send a number of at most 64 bits.")


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Refused:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return _Refused("This key stands twice in one object. Send it once.", twice)
    return value


def _check(value: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, _Refused):
        where = path if value.key is None else _below(path, value.key)
        raise InvalidRequest.at(_shown(where), value.message)
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path)
            _check(item, _below(path, key), depth + 1)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _check(item, _below(path, str(position)), depth + 1)


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


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(path: str) -> str:
    """Return a path that is valid text for a response."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\u0000")[:200]


def _too_deep() -> InvalidRequest:
    return InvalidRequest.at("", f"The body is nested deeper than {MAX_DEPTH} levels. Send it flatter.")
