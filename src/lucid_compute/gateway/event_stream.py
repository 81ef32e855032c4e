"""A node's event stream on its way to the client: passes on complete events, reads the usage, recognises the end.

It works on blocks of bytes, each with many events when the node is fast: work per event is done only in C.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.gateway.usage import Usage, find_usage

MAX_EVENT_BYTES = 1024 * 1024
_EVENT_ENDS = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
# Inside JSON text quotes and line ends are escaped: what begins a line, or is a quoted key, is not text.
_ERROR = re.compile(
    rb'(?:^|\n)(?P<event>data: ?\{\s*"(?:error"\s*:\s*[{"]|(?:object|type)"\s*:\s*"error")'
    rb"|event: ?error\r?\n|error: ?\{)"  # the last is llama.cpp's of 2024, and its forks'
)
# OpenAI's streaming events of a response: one of these is the last, and no [DONE] comes.
_RESPONSE_END = re.compile(rb'"type"\s*:\s*"response\.(completed|incomplete|failed)"')
_CODE = re.compile(rb'"code"\s*:\s*"?(\d{3})\b')
_CLIENTS_OWN = frozenset({b"400", b"413", b"422"})
_DONE_BYTES = 32
# What precedes a piece of text in the events of an endpoint: each piece is about one token.
_PIECES: dict[str, tuple[bytes, ...]] = {
    "chat/completions": (b'content":"', b'"arguments":"'),  # also reasoning_content
    "completions": (b'"text":"',),
    "responses": (b'"delta":"',),
}
_NO_PIECE = b'content":""'
_STYLE = re.compile(rb'data: ?\{\s*"[^"]*":( ?)')


class EventStream:
    """Parses blocks of a stream and returns what may be passed on.

    - `has_ended`: the node said that it is done.
    - `failed`: the node reported an error of its own; that event is not passed on.
    - `is_refused`: the node reported that the request is invalid.
    - `pieces`: how many pieces of text were passed on, each about one token.
    """

    __slots__ = (
        "_endpoint",
        "_last",
        "_pieces",
        "_rest",
        "_withholds_usage",
        "failed",
        "has_ended",
        "is_refused",
        "pieces",
        "usage",
    )

    def __init__(self, endpoint: str, *, withholds_usage: bool) -> None:
        """`withholds_usage`: the gateway asked for the usage and the client did not."""
        self._endpoint = endpoint
        self._withholds_usage = withholds_usage
        self._rest = bytearray()
        self._last = b""
        self.has_ended = self.failed = self.is_refused = False
        self.usage: Usage | None = None
        self.pieces = 0
        self._pieces: tuple[bytes, ...] = ()

    def feed(self, block: bytes) -> bytes:
        """Return the events that `block` completes, without a usage that the client did not ask for.

        Raises:
            EgressFault: an event is over 1 MiB.
        """
        if self._rest or (block[-2:] != b"\n\n" and block[-4:] != b"\r\n\r\n"):
            block = self._complete(block)
        return self._inspect(block) if block else b""

    def finish(self) -> bytes:
        """Return the rest if the node ended without a blank line and the rest is a complete event."""
        rest = bytes(self._rest)
        self._rest.clear()
        if _DONE.search(self._last):
            self.has_ended = True  # data followed it in the last block
        if not rest.strip():
            return rest  # half of a blank line
        return self._inspect(rest.rstrip() + b"\n\n") if _DONE.search(rest) else b""

    def _complete(self, block: bytes) -> bytes:
        """Return the complete events, and keep the rest. Only new bytes are searched: they may come one by one."""
        rest = self._rest
        start = max(0, len(rest) - 2)
        rest += block
        after_lines, after_returns = rest.rfind(b"\n\n", start), rest.rfind(b"\n\r\n", start)
        end = max(after_lines + 2 if after_lines >= 0 else 0, after_returns + 3 if after_returns >= 0 else 0)
        events = bytes(rest[:end])
        del rest[:end]
        if len(rest) > MAX_EVENT_BYTES:
            raise EgressFault(FaultKind.BAD_RESPONSE, f"An event of the stream is over {MAX_EVENT_BYTES} bytes.")
        return events

    def _inspect(self, block: bytes) -> bytes:
        if block.find(b'"usage"') >= 0:
            block = self._read_usage(block)
        if b"[DONE]" in block[-_DONE_BYTES:] and _DONE.search(block, max(0, len(block) - _DONE_BYTES - 2)):
            self.has_ended = True
        if self._endpoint == "responses" and (end := _RESPONSE_END.search(block)):
            self.has_ended = True
            if end[1] == b"failed":
                block = self._stop_at(block, end.start())
        if block.find(b"error") >= 0 and (found := _ERROR.search(block)):
            block = self._stop_at(block, found.start("event"))
        for piece in self._pieces or self._learn_style(block):
            self.pieces += block.count(piece)
        self._last = block
        return block

    def _stop_at(self, block: bytes, at: int) -> bytes:
        """Return what precedes the node's error, or the complete block if the client is responsible for the error."""
        before = b""
        for event in _EVENT_ENDS.split(block):
            if len(before) + len(event) > at:
                break
            before += event
        code = _CODE.search(event)
        if code is not None and code[1] in _CLIENTS_OWN:
            self.is_refused = self.has_ended = True
            return block
        self.failed, self.has_ended = True, False
        return before

    def _learn_style(self, block: bytes) -> tuple[bytes, ...]:
        """Return what precedes each piece of text as this node formats JSON; nothing before its first event."""
        if (style := _STYLE.search(block)) is None:
            return ()
        no_piece, self._pieces = _NO_PIECE, _PIECES.get(self._endpoint, ())
        if style[1]:
            no_piece = no_piece.replace(b":", b": ")
            self._pieces = tuple(piece.replace(b":", b": ") for piece in self._pieces)
        self.pieces -= block.count(
            no_piece, style.start(), block.find(b"\n", style.end())
        )  # the first chunk only names the role
        return self._pieces

    def _read_usage(self, block: bytes) -> bytes:
        """Return the block without events that contain only a usage which the client did not ask for."""
        self.usage = find_usage(block) or self.usage
        if not self._withholds_usage or not _NO_CHOICES.search(block):
            return block
        events = _EVENT_ENDS.split(block)
        return b"".join(_blank_lines_of(e) if _NO_CHOICES.search(e) and find_usage(e) else e for e in events)


def _blank_lines_of(event: bytes) -> bytes:
    """Return the line ends before an event: half of a blank line that was cut in two belongs to the previous event."""
    return event[: len(event) - len(event.lstrip(b"\r\n"))]


def error_event(endpoint: str, error: dict[str, Any]) -> bytes:
    """Return the event that ends a broken stream; OpenAI's clients raise it as an error."""
    if endpoint == "responses":
        flat = {name: error["error"].get(name) for name in ("code", "message", "param")}
        return b"event: error\ndata: " + json.dumps({"type": "error", **flat, **error}).encode() + b"\n\n"
    return b"data: " + json.dumps(error).encode() + b"\n\n"
