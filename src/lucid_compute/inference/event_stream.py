"""A node's event stream on its way to the client: whole events only, its usage read, its end known.

Works on blocks of bytes, each with many events when the node is fast: per event nothing is done but in C.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.inference.usage import Usage, find_usage

MAX_EVENT_BYTES = 1024 * 1024
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_ERROR = re.compile(rb'(?:^|\n)(?P<event>data: ?\{\s*"error"\s*:\s*[{"])')
_CODE = re.compile(rb'"code"\s*:\s*"?(\d{3})\b')
_CLIENTS_OWN = frozenset({b"400", b"413", b"422"})
_DONE_BYTES = 32
# What stands before a piece of text in the events of an endpoint: each is about one token.
_PIECES: dict[str, tuple[bytes, ...]] = {
    "chat/completions": (b'content":"', b'"arguments":"'),  # also reasoning_content
    "completions": (b'"text":"',),
    "responses": (b'"delta":"',),
}
_NO_PIECE = b'content":""'


class EventStream:
    """Takes in blocks and gives back what may be passed on.

    `has_ended`: the node said that it is done. `failed`: an event of the node, which is not passed on, said that it
    can't go on. `is_refused`: it said that the request is at fault.
    `pieces` counts what was passed on of the text, which is about a token each.
    """

    __slots__ = (
        "_endpoint",
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
        """Start at the beginning. `withholds_usage`: we asked for it and the client did not."""
        self._endpoint = endpoint
        self._withholds_usage = withholds_usage
        self._rest = b""
        self.has_ended = self.failed = self.is_refused = False
        self.usage: Usage | None = None
        self.pieces = 0
        self._pieces: tuple[bytes, ...] = ()

    def take_in(self, block: bytes) -> bytes:
        """Answer the whole events that `block` completes, without a usage that nobody asked for.

        Raises:
            EgressFault: an event is longer than it may be.
        """
        if self._rest:
            block = self._rest + block
        end = block.rfind(b"\n\n") + 2
        if end == 1:
            end = block.rfind(b"\r\n\r\n") + 4
            if end == 3:  # noqa: PLR2004 - not found
                end = 0
        self._rest = block[end:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EgressFault(FaultKind.BAD_RESPONSE, f"An event of the stream is over {MAX_EVENT_BYTES} bytes.")
        if end != len(block):
            block = block[:end]
        return self._look_at(block) if block else b""

    def finish(self) -> bytes:
        """Answer what is left when the node has ended without a blank line, if it is a whole event."""
        rest, self._rest = self._rest, b""
        return self._look_at(rest.rstrip() + b"\n\n") if _DONE.search(rest) else b""

    def _look_at(self, block: bytes) -> bytes:
        if block.find(b'"usage":') >= 0:
            block = self._read_usage(block)
        if b"[DONE]" in block[-_DONE_BYTES:] and _DONE.search(block, max(0, len(block) - _DONE_BYTES - 2)):
            self.has_ended = True
        if block.find(b'{"error"') >= 0 and (found := _ERROR.search(block)):
            block = self._stop_at(block, found.start("event"))
        for piece in self._pieces or self._know_pieces(block):
            self.pieces += block.count(piece)
        return block

    def _stop_at(self, block: bytes, at: int) -> bytes:
        """Answer what comes before the node's error; or all, when that is the client's own, which it should see."""
        code = _CODE.search(block, at)
        if code is not None and code[1] in _CLIENTS_OWN:
            self.is_refused = self.has_ended = True
            return block
        self.failed, self.has_ended = True, False
        return block[:at]

    def _know_pieces(self, block: bytes) -> tuple[bytes, ...]:
        """Answer what stands before each piece of text, as this node writes JSON."""
        self._pieces = _PIECES.get(self._endpoint, ())
        if b'":' in block and b'": ' in block[: block.find(b"\n\n")]:
            self._pieces = tuple(piece.replace(b":", b": ") for piece in self._pieces)
        self.pieces -= block.count(_NO_PIECE)  # a first event that only names the role
        return self._pieces

    def _read_usage(self, block: bytes) -> bytes:
        separator = b"\r\n\r\n" if b"\r\n\r\n" in block else b"\n\n"
        kept = []
        for event in block.split(separator):
            usage = find_usage(event)
            if usage is not None:
                self.usage = usage
                if self._withholds_usage and _NO_CHOICES.search(event):
                    continue
            if self._endpoint == "responses" and b"response.completed" in event:
                self.has_ended = True
            kept.append(event)
        return separator.join(kept)


def error_event(endpoint: str, error: dict[str, Any]) -> bytes:
    """Answer the event that ends a broken stream, as OpenAI's clients raise it."""
    if endpoint == "responses":
        return b"event: error\ndata: " + json.dumps({"type": "error", **error}).encode() + b"\n\n"
    return b"data: " + json.dumps(error).encode() + b"\n\n"
