"""Finds the fields of a large JSON object in steps, so that a body of any size holds up no other request.

It knows strings, brackets and what may stand between them, and checks UTF-8 and nesting. The rest of JSON's grammar is
the node's to judge.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Generator, Iterator
from typing import NamedTuple

from lucid_compute.errors import InvalidRequest
from lucid_compute.wire import FieldFault

STEP_BYTES = 64 * 1024  # that one regular expression looks at: a few milliseconds at worst
STEP_TOKENS = 1000  # that Python looks at in a step
MAX_ESCAPED_NAMES = 10_000
MAX_DEPTH = 200
NO_HALVES = "Text may not hold half a surrogate pair. Send whole characters."
_MAX_NAME_BYTES = 1024  # of a name that may be one of those searched for
_SPACE = rb"[ \t\n\r]*+"
_VALUES = rb"[ \t\n\r\d,:.+\-eEtrufalsn]++"  # numbers, true, false, null, and what stands between values
# Of surrogates only a whole pair, because parsers read a half of one differently.
_ESCAPE = rb'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[\da-fA-F]{4}|u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2})'
_TEXT = rb'(?:[^"\\\x00-\x1f]++|' + _ESCAPE + rb")*+"
_STRING = rb'"' + _TEXT + rb'"'
_LEAF = rb"[\[{](?:" + _VALUES + rb"|" + _STRING + rb")*+[\]}]"
_SCALAR = rb"[\d.+\-eEtrufalsn]++"
_HALF = re.compile(rb"\\u[dD][89a-fA-F][\da-fA-F]{2}")
_space, _text, _scalar = re.compile(_SPACE), re.compile(_TEXT), re.compile(_SCALAR)
_inside = re.compile(rb"(?:" + _VALUES + rb"|" + _STRING + rb"|" + _LEAF + rb")*+")


class Member(NamedTuple):
    """A field by its positions: of its key, its value, its end, and of the next field or the object's end."""

    name: str
    key_at: int
    value_at: int
    end_at: int
    next_at: int


class BodyScan:
    """Scans one body for the fields called `names`. `steps` does the work; `members` and `close_at` are its result.

    `close_at` is the position of the object's last bracket.
    """

    def __init__(self, body: bytes, names: Collection[str]) -> None:
        self.members: list[Member] = []
        self.close_at = -1
        self._body = body
        self._names = frozenset(names)
        self._at = self._tokens = self._stepped_at = self._escaped_names = 0
        name = rb'"(?!(?:%b)")[^"\\\x00-\x1f]*+"' % "|".join(map(re.escape, names)).encode()
        value = rb"(?:" + _SCALAR + rb"|" + _STRING + rb"|" + _LEAF + rb")"
        self._others = re.compile(rb"(?:" + _SPACE.join((b"", name, rb":", value, rb",")) + rb")*+")

    def steps(self) -> Iterator[None]:
        """Do the work, one step at each iteration.

        Raises:
            InvalidRequest: the body is not a JSON object.
        """
        yield from self._check_encoding()
        if self._next() in {b"[", b'"'}:
            raise InvalidRequest([FieldFault("", "Send a JSON object.")], status=422)
        self._expect(b"{")
        if self._next() != b"}":
            yield from self._scan_members()
        self.close_at = self._at
        self._expect(b"}")
        if self._next():
            raise self._invalid()

    def _check_encoding(self) -> Iterator[None]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for start in range(0, len(self._body), STEP_BYTES):
                decoder.decode(self._body[start : start + STEP_BYTES])
                yield
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise InvalidRequest([FieldFault("", "The body is not UTF-8. Send JSON in UTF-8.")], status=400) from None

    def _scan_members(self) -> Iterator[None]:
        while True:
            self._at = self._match(self._others)
            self._next()
            key_at = self._at
            name = yield from self._read_name()
            value_at = self._at
            yield from self._skip_value()
            end_at = self._at
            has_more = self._next() == b","
            if has_more:
                self._at += 1
                self._next()
            if name in self._names:
                self.members.append(Member(name, key_at, value_at, end_at, self._at))
            if not has_more:
                return
            if self._end_step():
                yield

    def _read_name(self) -> Generator[None, None, str]:
        """Return the field's name, and go to its value; a name too long for those searched for is empty."""
        start = self._at
        if self._next() != b'"':
            raise self._invalid()
        yield from self._skip_string()
        name = self._body[start + 1 : self._at - 1] if self._at - start <= _MAX_NAME_BYTES else b""
        self._expect(b":")
        self._next()
        return self._unescape(name) if b"\\" in name else name.decode()

    def _unescape(self, name: bytes) -> str:
        self._escaped_names += 1
        if self._escaped_names > MAX_ESCAPED_NAMES:
            raise InvalidRequest([FieldFault("", "Send the names of fields without escapes.")], status=422)
        try:
            return str(json.loads(b'"%b"' % name))
        except ValueError:
            raise self._invalid() from None

    def _skip_value(self) -> Iterator[None]:
        first = self._next()
        if first == b'"':
            yield from self._skip_string()
        elif first in {b"[", b"{"}:
            yield from self._skip_brackets()
        elif (end := self._match(_scalar)) > self._at:
            self._at = end
        else:
            raise self._invalid()

    def _skip_brackets(self) -> Iterator[None]:
        depth, start = 0, self._at
        while True:
            sign = self._body[self._at : self._at + 1]
            if sign in {b"[", b"{"}:
                depth += 1
                self._at += 1
                if depth > MAX_DEPTH:
                    message = f"The body is nested deeper than {MAX_DEPTH} levels. Send it flatter."
                    raise InvalidRequest([FieldFault("", message)], status=400)
            elif sign in {b"]", b"}"}:
                depth -= 1
                self._at += 1
                if not depth:
                    return
            elif sign == b'"':  # one that does not end within a step
                yield from self._skip_string()
            elif self._at == start:
                raise self._invalid()
            start, self._at = self._at, self._match(_inside)
            if self._end_step():
                yield

    def _skip_string(self) -> Iterator[None]:
        self._at += 1
        while (sign := self._body[self._at : self._at + 1]) != b'"':
            end = self._match(_text)
            if end == self._at or not sign:
                raise self._invalid()
            self._at = end
            if self._end_step():
                yield
        self._at += 1

    def _match(self, pattern: re.Pattern[bytes]) -> int:
        """Return where a match that begins here ends, within a step."""
        match = pattern.match(self._body, self._at, self._at + STEP_BYTES)
        return match.end() if match else self._at

    def _next(self) -> bytes:
        """Go to the next byte that is no white space, and return it; empty at the end."""
        space = _space.match(self._body, self._at)
        self._at = space.end() if space else self._at
        return self._body[self._at : self._at + 1]

    def _expect(self, sign: bytes) -> None:
        if self._next() != sign:
            raise self._invalid()
        self._at += 1

    def _end_step(self) -> bool:
        """Count a token; return whether the step is over, and begin the next."""
        self._tokens += 1
        if self._tokens < STEP_TOKENS and self._at - self._stepped_at < STEP_BYTES:
            return False
        self._tokens, self._stepped_at = 0, self._at
        return True

    def _invalid(self) -> InvalidRequest:
        message = f"The body is not JSON at byte {self._at}. Send a JSON object."
        if self._body.startswith((b"NaN", b"Infinity"), self._at):
            message = "NaN and Infinity are no JSON numbers. Send a finite number, or null."
        if _HALF.match(self._body, self._at):
            message = NO_HALVES
        return InvalidRequest([FieldFault("", message)], status=400)
