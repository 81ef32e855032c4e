"""A node's event stream on its way to the client: passes on complete events, reads the usage, recognises the end.

It works on blocks of bytes, each with many events when the node is fast. Work per event is done only in C, except for
the events before the first content, and those that seem to hold an error, a usage, or the end. An event that differs
from an earlier one only in its piece of text is recognised at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.gateway.endpoints import EventEnd, InferenceEndpoint, StreamStyle
from lucid_compute.gateway.node_json import (
    PARSED_BYTES,
    clients_own_status,
    error_in,
    has_content,
    read_beginning,
    read_object,
)
from lucid_compute.gateway.usage import Usage, find_usage

MAX_EVENT_BYTES = 8 * 1024 * 1024
MAX_HELD_BYTES = 64 * 1024  # of events without content; some repeat the request in the first
DONE = b"data: [DONE]\n\n"
_BLANK_LINE = re.compile(rb"\n\r?\n")
_LINE_END = re.compile(rb"\r?\n|\r(?=[^\n])")
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
# Inside JSON text quotes and line ends are escaped: what begins a line, or is a quoted key, is not text. Each of these
# expressions only says which events have to be read; what their own fields say decides.
_ERROR = re.compile(
    rb'"error"\s*:\s*[^\sn]|"(?:object|type|finish_reason)"\s*:\s*"error"'
    rb"|(?:^|\n)(?:event: ?error\r?\n|error: ?\{)"  # the last is llama.cpp's of 2024, and its forks'
)
_ERROR_LINE = re.compile(rb"(?:^|\n)(?:event: ?error\r?\n|error: ?\{)")
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"[^"]')
_HAS_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*[^\s\]]')
_CODE = re.compile(rb'"code"\s*:\s*"?(?:400|413|422)\b')
_NO_PIECE = b'content":""'
_NO_USAGE = re.compile(rb'"usage": ?null')
_STYLE = re.compile(rb'data: ?\{\s*"[^"]*":( ?)')
_LAST_BYTES = 128
_AFTER_TEXT = (b'"}', b'",')  # so that text and what follows it are never read as a key
_MAX_USUAL_LEARNT = 16  # of a stream whose events differ in more than their text, before that is given up
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNKNOWN = StreamStyle(())


class EventStream:
    """Parses blocks of a stream and returns what may be passed on.

    - `has_begun`: an event with content came, or one that ends the stream. Until then every event is held back.
    - `is_finished`: every choice has said why it finished. Only a usage may follow.
    - `has_ended`: the node said that it is done.
    - `failed`: the node reported an error of its own; that event is not passed on.
    - `is_refused`: the node reported that the request is invalid.
    - `pieces`: how many pieces of text were passed on, each about one token. `delivered_bytes`: of all that was.
    """

    __slots__ = (
        "_choices",
        "_end",
        "_finished",
        "_has_only_returns",
        "_held",
        "_knows_line_end",
        "_max_event_bytes",
        "_pieces",
        "_rest",
        "_style",
        "_usual_end",
        "_usual_learnt",
        "_usual_start",
        "_withholds_usage",
        "delivered_bytes",
        "failed",
        "has_begun",
        "has_ended",
        "is_finished",
        "is_refused",
        "pieces",
        "usage",
    )

    def __init__(
        self,
        endpoint: InferenceEndpoint,
        *,
        withholds_usage: bool,
        choices: int = 1,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        """`withholds_usage`: the gateway asked for the usage, the client did not. `choices`: how many there will be."""
        self._style = endpoint.stream or _UNKNOWN
        self._end = self._style.end
        self._withholds_usage = withholds_usage
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()
        self._held = bytearray()
        self._finished: set[Any] = set()
        self._choices = choices
        self._knows_line_end = self._has_only_returns = False
        self.has_begun = self.is_finished = self.has_ended = self.failed = self.is_refused = False
        self.usage: Usage | None = None
        self.pieces = self.delivered_bytes = 0
        self._pieces: tuple[bytes, ...] = ()
        # What precedes and follows the text of a usual event: one that holds a piece of text and nothing else to read.
        self._usual_start = self._usual_end = b""
        self._usual_learnt = 0

    def feed(self, block: bytes) -> bytes:
        """Return the events that `block` completes, without a usage that the client did not ask for.

        Raises:
            EgressFault: an event is over the limit.
        """
        start, end = self._usual_start, self._usual_end
        if start and block.startswith(start) and block.endswith(end) and not self._rest:
            text_at, text_end = len(start), len(block) - len(end)
            if text_at <= text_end and block.find(b'"', text_at, text_end) < 0 > block.find(b"\n", text_at, text_end):
                self.pieces += 1
                self.delivered_bytes += len(block)
                return block
        if not self._knows_line_end:
            block = self._learn_line_end(block)
        if self._has_only_returns:
            block = block.replace(b"\r", b"\n")
        if self._rest or (block[-2:] != b"\n\n" and block[-4:] != b"\r\n\r\n"):
            block = self._complete(block)
        return self._inspect(block) if block else b""

    def finish(self) -> bytes:
        """Return the rest if the node ended without a blank line and the rest says that it is done."""
        rest = bytes(self._rest)
        self._rest.clear()
        if not rest.strip():
            return rest if self.has_begun else b""  # half of a blank line
        return self._inspect(rest.rstrip() + b"\n\n") if _DONE.search(rest) else b""

    def _learn_line_end(self, block: bytes) -> bytes:
        """Return what came so far once the first line has ended: CR alone ends lines too, and becomes LF here."""
        rest = self._rest
        start = max(0, len(rest) - 1)
        rest += block
        end = _LINE_END.search(rest, start)
        if end is None:
            self._require_room()
            return b""
        self._knows_line_end, self._has_only_returns = True, end[0] == b"\r"
        block = bytes(rest)
        rest.clear()
        return block.removeprefix(_BYTE_ORDER_MARK)

    def _complete(self, block: bytes) -> bytes:
        """Return the complete events, and keep the rest. Only new bytes are searched: they may come one by one."""
        rest = self._rest
        start = max(0, len(rest) - 2)
        rest += block
        after_lines, after_returns = rest.rfind(b"\n\n", start), rest.rfind(b"\n\r\n", start)
        end = max(after_lines + 2 if after_lines >= 0 else 0, after_returns + 3 if after_returns >= 0 else 0)
        events = bytes(rest[:end])
        del rest[:end]
        self._require_room()
        return events

    def _require_room(self) -> None:
        if len(self._rest) > self._max_event_bytes:
            raise EgressFault(FaultKind.TOO_LARGE, f"An event of the stream is over {self._max_event_bytes} bytes.")

    def _inspect(self, block: bytes) -> bytes:
        pieces, received = self.pieces, block
        has_error = block.find(b"error") >= 0 and _ERROR.search(block) is not None
        if has_error:
            block = self._stop_at_error(block)
        finish = _FINISH.search(block)
        if finish is not None:
            self._read_finish(block[max(0, block.rfind(b"\n\n", 0, finish.start())) :])  # from its event on
        if (usages := block.count(b'"usage"')) and usages != len(_NO_USAGE.findall(block)):
            block = self._read_usage(block)
        if block.find(b"[DONE]") >= 0 and self._style.takes_done and _DONE.search(block):
            self.has_ended = True
        if self._end is not None and self._end.named.search(block):
            block = self._read_end(self._end, block)
        if not self.has_begun:
            block = self._hold(block)
        for piece in self._pieces or self._learn_style(block):
            self.pieces += block.count(piece)
        self.delivered_bytes += len(block)
        if block is received and self.pieces == pieces + 1 and not (has_error or finish or self.has_ended):
            self._learn_usual(block)
        return block

    def _learn_usual(self, block: bytes) -> None:
        """Learn what surrounds the text of an event, if the block is one event without a usage."""
        if self._usual_learnt >= _MAX_USUAL_LEARNT or self.usage is not None or block.find(b"\n\n") != len(block) - 2:
            return
        self._usual_learnt += 1
        for piece in self._pieces:
            text_at = block.find(piece) + len(piece)
            text_end = block.find(b'"', text_at)
            if text_at >= len(piece) and block[text_end : text_end + 2] in _AFTER_TEXT:
                self._usual_start, self._usual_end = block[:text_at], block[text_end:]

    def _hold(self, block: bytes) -> bytes:
        """Return the events held back and `block` if that begins the answer; else hold it back."""
        held = self._held
        held += block
        self.has_begun = self.is_refused or any(map(self._begins_answer, _events_of(block)))
        if not self.has_begun and len(held) > MAX_HELD_BYTES:
            self.has_begun = held.find(b"data:") >= 0
            if not self.has_begun:
                held.clear()  # comments
        if not self.has_begun:
            return b""
        block = bytes(held)
        held.clear()
        return block

    def _begins_answer(self, event: bytes) -> bool:
        """Return whether an event holds content, or ends the answer; comments, pings and roles do not."""
        value = _read_event(event)
        if value is None:
            return False
        if self._end is not None:
            kind, style = value.get("type"), self._style
            if isinstance(kind, str):
                return kind.startswith(style.begins) and kind not in style.announces
        choices = value.get("choices")
        return isinstance(choices, list) and any(map(has_content, choices))

    def _stop_at_error(self, block: bytes) -> bytes:
        """Return what precedes an error; the complete block without one, or if the client is responsible for it."""
        before = 0
        for event in _events_of(block):
            error, is_clients = _error_of(event)
            if is_clients:
                self.is_refused = self.has_ended = True
                return block
            if error:
                self.failed = True
                return block[:before]
            before += len(event)
        return block

    def _read_end(self, end: EventEnd, block: bytes) -> bytes:
        """Return the block; without its last event if that says that the answer failed."""
        before = 0
        for event in _events_of(block):
            kind = _end_of(event, end)
            if kind == end.failed:
                return self._stop_at_failure(event, block, before)
            if kind is not None:
                self.has_ended = True
            before += len(event)
        return block

    def _stop_at_failure(self, event: bytes, block: bytes, before: int) -> bytes:
        if _CODE.search(event):
            self.is_refused = self.has_ended = True
            return block
        self.failed = True
        return block[:before]

    def _read_finish(self, block: bytes) -> None:
        """Count the choices that have said why they finished."""
        for event in _events_of(block):
            if _FINISH.search(event) is None:
                continue
            if len(event) > PARSED_BYTES:
                self._finished.add(0)
            choices = (_read_event(event) or {}).get("choices")
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict) and choice.get("finish_reason"):
                    index = choice.get("index")
                    self._finished.add(index if isinstance(index, int) and 0 <= index < self._choices else 0)
        self.is_finished = len(self._finished) >= self._choices

    def _learn_style(self, block: bytes) -> tuple[bytes, ...]:
        """Return what precedes each piece of text as this node formats JSON; nothing before its first event."""
        if (style := _STYLE.search(block)) is None:
            return ()
        no_piece, self._pieces = _NO_PIECE, self._style.pieces
        if style[1]:
            no_piece = no_piece.replace(b":", b": ")
            self._pieces = tuple(piece.replace(b",", b", ").replace(b":", b": ") for piece in self._pieces)
        self.pieces -= block.count(
            no_piece, style.start(), block.find(b"\n", style.end())
        )  # the first chunk only names the role
        return self._pieces

    def _read_usage(self, block: bytes) -> bytes:
        """Return the block without events that contain only a usage which the client did not ask for."""
        if self._style.input_usage:
            self._add_usages(block)
        else:
            self.usage = find_usage(block) or self.usage
        if not self._withholds_usage:
            return block
        return b"".join(_blank_lines_of(e) if self._is_ours(e) else e for e in _events_of(block))

    def _add_usages(self, block: bytes) -> None:
        """Read a usage whose input and output are in two events, or both in the later one."""
        for event in _events_of(block):
            if (found := find_usage(event, counts_cached=True)) is None:
                continue
            tokens_in, tokens_out = found
            if tokens_in is None and self.usage is not None:
                tokens_in = self.usage.tokens_in
            self.usage = Usage(tokens_in, None if event.find(self._style.input_usage) >= 0 else tokens_out)

    def _is_ours(self, event: bytes) -> bool:
        """Return whether an event only tells the usage: it has no choices, or empty ones after all have finished."""
        if event.find(b'"usage"') < 0 or len(event) > PARSED_BYTES:
            return False
        if not self.is_finished and _HAS_CHOICES.search(event):
            return False
        value = _read_event(event)
        if value is None or not isinstance(value.get("usage"), dict):
            return False
        choices = value.get("choices")
        return not choices or (isinstance(choices, list) and not any(map(has_content, choices)))


def response_id_in(block: bytes) -> str | None:
    """Return the id of the response that an event tells of; None if none does."""
    for event in _events_of(block):
        response = (_read_event(event) or {}).get("response")
        if isinstance(response, dict) and isinstance(own := response.get("id"), str):
            return own
    return None


def _events_of(block: bytes) -> Iterator[bytes]:
    """Yield the events of a block; together they are the block."""
    at = 0
    for blank in _BLANK_LINE.finditer(block):
        yield block[at : blank.end()]
        at = blank.end()
    if at < len(block):
        yield block[at:]


def _values_of(event: bytes, field: bytes) -> list[bytes]:
    """Return what an event's lines of a field hold, of its first 64 KiB."""
    lines = event[:PARSED_BYTES].split(b"\n")
    return [line[len(field) :].strip() for line in lines if line.startswith(field)]


def _read_event(event: bytes) -> dict[str, Any] | None:
    """Return the object in an event's data, or its beginning; None of a comment, of [DONE], and of what is not JSON."""
    data = b"\n".join(_values_of(event, b"data:"))
    return read_object(data) if len(event) <= PARSED_BYTES else read_beginning(data)


def _error_of(event: bytes) -> tuple[bool, bool]:
    """Return whether an event tells of an error, and whether the client is responsible for it."""
    if _ERROR.search(event) is None:
        return False, False
    if _ERROR_LINE.search(event):
        return True, _CODE.search(event) is not None
    value = _read_event(event)
    error = value and error_in(value)
    return bool(error), bool(value and error and clients_own_status(value, error))


def _end_of(event: bytes, end: EventEnd) -> str | None:
    """Return the event's type if it ends a stream; None if it does not, whatever is told inside of it."""
    if end.named.search(event) is None:
        return None
    kind = (_read_event(event) or {}).get("type")
    if kind is None:  # of a large event only the beginning is read
        last = end.last.search(event[-_LAST_BYTES:])
        named = [last[1]] if last and len(event) > PARSED_BYTES else _values_of(event, b"event:")
        kind = named[0].decode("utf-8", "replace") if named else None
    return kind if isinstance(kind, str) and end.named.fullmatch(kind.encode("utf-8", "replace")) else None


def _blank_lines_of(event: bytes) -> bytes:
    """Return the line ends before an event: half of a blank line that was cut in two belongs to the previous event."""
    return event[: len(event) - len(event.lstrip(b"\r\n"))]


def add_cost(block: bytes, cost_usd: str) -> bytes:
    """Return a block of events with `cost` in each usage that comes without choices, as OpenRouter writes it."""
    return b"".join(_with_cost(event, cost_usd) for event in _events_of(block))


def _with_cost(event: bytes, cost_usd: str) -> bytes:
    if event.find(b'"usage"') < 0 or len(event) > PARSED_BYTES or event.count(b"data:") != 1:
        return event
    value = _read_event(event)
    if value is None or value.get("choices", True) or not isinstance(value.get("usage"), dict):
        return event
    usage = {name: each for name, each in value.pop("usage").items() if name != "cost"}
    before = json.dumps({**value, "usage": {**usage, "cost": 0}}, separators=(",", ":"))
    written = before.removesuffix("0}}") + cost_usd + "}}"  # exact, which json can't write
    at = event.find(b"data:")
    line_end = _LINE_END.search(event, at)
    return event[:at] + b"data: " + written.encode() + event[line_end.start() if line_end else len(event) :]


def error_event(endpoint: InferenceEndpoint, error: dict[str, Any]) -> bytes:
    """Return the event that ends a broken stream; OpenAI's and Anthropic's clients raise it as an error."""
    if error.get("type") == "error":  # Anthropic's shape
        return b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
    if endpoint.stream is not None and endpoint.stream.end is not None:
        flat = {name: error["error"].get(name) for name in ("code", "message", "param")}
        return b"event: error\ndata: " + json.dumps({"type": "error", **flat, **error}).encode() + b"\n\n"
    return b"data: " + json.dumps(error).encode() + b"\n\n"
