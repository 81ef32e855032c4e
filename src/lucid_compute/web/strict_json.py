"""A strict JSON reader: it refuses what Python accepts and Postgres or a client can't hold."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Union

from lucid_compute.errors import InvalidRequest
from lucid_compute.wire import INT64_MAX, FieldFault

MAX_DEPTH = 64
MAX_VALUES = 20_000  # in one body; far more than any route takes, and some 50 ms of work from here to the response
MAX_SEPARATORS = 40_000  # there are also some in texts, of which a passport holds at most 36 KB
MAX_KEYS = 5_000  # in one object; more do not fit into a passport's metadata
_SHOWN_CHARACTERS = 200  # of a path
_DIGITS = 20  # of 64 bits, with a sign

Known = Mapping[str, Union["Known", None]]
"""The keys of an object that are read, each with those of its own value: None is all of them. A list passes it on."""

_IGNORED: Known = {}
# A text; or of one, a half of a surrogate pair, and what else may be taken for it. A number of very many digits.
_HALVES = re.compile(
    rb"\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(u[dD][89a-fA-F][\da-fA-F]{2})|.)", re.DOTALL
)
_LONG_NUMBERS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([1-9]\d{1000,}+)', re.DOTALL)
_AS_LARGE = b"9" * 18


def read_strictly(body: bytes, known: Known | None = None) -> Any:
    """Return the value of a JSON text.

    A key that is not `known` is ignored by its reader, who may not look at what is below it. That only has to be JSON
    within the limits of depth and size. None: every value is read.

    Raises:
        InvalidRequest: 400 when it is not JSON in UTF-8; 422 for NaN and infinities, numbers beyond 64 bits, NUL,
            lone surrogates, a key twice in one object, nesting deeper than 64, and more values than any route takes.
    """
    require_few_values(body)
    try:
        value = _load_any(body.decode("utf-8"))
        _Check().visit([value], -1, known)
    except _Fault as fault:
        raise InvalidRequest.at(_shown(fault.path[:-1]), fault.message) from None  # without the position in our list
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        message = fault_of_encoding(body) or "The body is not UTF-8. Send JSON in UTF-8."
        raise InvalidRequest([FieldFault("", message)], status=400) from None
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        message = fault_of_encoding(body) or f"The body is not JSON {where}. Send a JSON object."
        raise InvalidRequest([FieldFault("", message)], status=400) from None
    return value


def _load(text: str, read_int: Callable[[str], Any] = int) -> Any:
    """Return the value, with each refused part of it as `_Refused`."""
    return json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_read_float,
        parse_int=read_int,
        object_pairs_hook=_read_object,
    )


def _load_any(text: str) -> Any:
    """Return the value; slower only if Python refuses to convert an integer of thousands of digits."""
    try:
        return _load(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _load(text, _read_int)


def with_short_numbers(text: bytes) -> bytes:
    """Return a JSON text with 18 digits in place of more than 1,000, of which pydantic-core reads no number."""
    return _LONG_NUMBERS.sub(lambda token: _AS_LARGE if token[1] else token[0], text)


def with_whole_characters(text: bytes) -> bytes:
    """Return a JSON text with U+FFFD in place of each half of a surrogate pair, which pydantic-core refuses."""
    return _HALVES.sub(lambda escape: b"\\ufffd" if escape[1] else escape[0], text)


def require_few_values(body: bytes) -> None:
    """Check in a moment that a JSON text has no more values than are worth a closer look.

    Raises:
        InvalidRequest: it has.
    """
    if len(body) > MAX_SEPARATORS and body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_SEPARATORS:
        raise _too_many()


_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_MARKS |= {codecs.BOM_UTF16_BE: "UTF-16"}


def fault_of_encoding(body: bytes) -> str | None:
    """Return the sentence that names the encoding of a body which could not be read; None if it may be UTF-8."""
    if body.startswith(codecs.BOM_UTF8):
        return "The body begins with a byte order mark (BOM). Send JSON in UTF-8 without it."
    encoding = next((name for mark, name in _MARKS.items() if body.startswith(mark)), None)
    if encoding is None and b"\x00" in body[:2]:  # half of an ASCII character
        encoding = "UTF-32" if body[:4].count(0) == 3 else "UTF-16"  # noqa: PLR2004 - of four bytes
    return encoding and f"The body is {encoding}. Send JSON in UTF-8."


class _Refused(NamedTuple):
    """Stands for a refused value until `_Check` finds it and knows its path."""

    message: str
    key: str | None = None
    is_json: bool = True


def _refuse_constant(constant: str) -> _Refused:
    message = f"{constant} is not a JSON number. Send a finite number, or null when it is unknown."
    return _Refused(message, is_json=False)


def _read_float(digits: str) -> float | _Refused:
    """Return the number; a whole one as an integer, since JSON Schema counts 3.0 as one."""
    number = float(digits)
    if not math.isfinite(number):
        return _too_large(digits)
    return int(number) if number.is_integer() and abs(number) <= INT64_MAX else number


def _read_int(digits: str) -> int | _Refused:
    return _too_large(digits) if len(digits) > _DIGITS else int(digits)


def _too_large(digits: str) -> _Refused:
    return _Refused(f"{digits[:40]} is too large. Send a number of at most 64 bits.")


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Refused:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return _Refused("This key stands twice in one object. Send it once.", twice)
    return value


class _Fault(Exception):
    """A value that is refused. Its path is collected on the way out, from the last part to the first."""

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(message)
        self.message = message
        self.path = [*path]


class _Check:
    """One look at every value of a body; `values` counts them."""

    def __init__(self) -> None:
        self.values = -1  # the list around the body's value is not one

    def visit(self, container: dict[str, Any] | list[Any], depth: int, known: Known | None) -> None:
        """Check what is in a container, which is itself `depth` levels deep, and of which `known` is read.

        Raises:
            _Fault: a value is refused.
            InvalidRequest: there are too many, or they are nested too deep.
        """
        self.values += len(container)
        if self.values > MAX_VALUES:
            raise _too_many()
        if depth >= MAX_DEPTH and container:
            raise _too_deep()
        below = known
        for key, item in _items_of(container, known):
            if known is not None and type(key) is str:
                below = known.get(key, _IGNORED)
            try:
                kind = type(item)
                if kind is dict or kind is list:
                    self.visit(item, depth + 1, below)
                elif below is not _IGNORED:
                    _check_value(item)
                elif kind is _Refused and not item.is_json:
                    raise _Fault(item.message)
            except _Fault as fault:
                fault.path.append(str(key))
                raise


def _check_value(item: Any) -> None:
    """Check a value that is no container."""
    kind = type(item)
    if kind is int:
        if not -INT64_MAX <= item <= INT64_MAX:
            raise _Fault(_too_large(str(item)).message)
    elif kind is str:
        _check_text(item)
    elif kind is _Refused:
        raise _Fault(item.message, *([] if item.key is None else [item.key]))


def _items_of(container: dict[str, Any] | list[Any], known: Known | None) -> Iterable[tuple[str | int, Any]]:
    """Return the keys or positions of a container with their values; first check the keys."""
    if not isinstance(container, dict):
        return enumerate(container)
    if len(container) > MAX_KEYS:
        raise _too_many()
    if known is None:
        for key in container:
            _check_text(key)
    return container.items()


def _check_text(text: str) -> None:
    if "\x00" in text:
        message = "Text may not hold NUL. Leave it out."
        raise _Fault(message)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            message = "Text may not hold half a surrogate pair. Send whole characters."
            raise _Fault(message) from None


def _shown(path: list[str]) -> str:
    """Return a path, which begins with its last part, as valid text for a response."""
    text = ".".join(part[:_SHOWN_CHARACTERS] for part in reversed(path))
    shown = text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\u0000")
    return shown[:_SHOWN_CHARACTERS]


def _too_deep() -> InvalidRequest:
    return InvalidRequest.at("", f"The body is nested deeper than {MAX_DEPTH} levels. Send it flatter.")


def _too_many() -> InvalidRequest:
    message = f"The body holds more than {MAX_VALUES} values, or more than {MAX_KEYS} in one object. Send fewer."
    return InvalidRequest.at("", message)
