"""What a provider answers, taken in within limits: called by httptools, part by part.

Nothing here trusts the answer: sizes are bounded, and what breaks a rule becomes an `EgressFault`.
"""

from __future__ import annotations

from httptools import HttpResponseParser

from lucid_compute.egress.faults import EgressFault, FaultKind

MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_STREAM_BYTES = 64 * 1024 * 1024
MAX_PARTS = 64  # of a body, each of which takes some 50 bytes besides its own; more are joined
_STREAM = b"text/event-stream"
_MINDED = frozenset({b"content-type", b"content-length", b"transfer-encoding", b"content-encoding", b"retry-after"})
_CONTINUE, _SWITCHING, _OK = 100, 101, 200  # plain numbers, because HTTPStatus costs a look-up each time


class IncomingAnswer:
    """One answer: `status`, `content_type`, and the body in parts. `is_whole`: it has ended as HTTP says it must."""

    __slots__ = (
        "_body_bytes",
        "_buffered",
        "_fault",
        "_head_bytes",
        "_is_framed",
        "_joins_after",
        "_keeps_alive",
        "_parts",
        "_wants_stream",
        "content_type",
        "has_head",
        "heard",
        "is_stream",
        "is_whole",
        "parser",
        "retry_after",
        "status",
    )

    parser: HttpResponseParser

    def _start(self, *, wants_stream: bool) -> None:
        self._fault: EgressFault | None = None
        self._parts: list[bytes] = []
        self._head_bytes = self._body_bytes = self._buffered = 0
        self._joins_after = MAX_PARTS
        self._wants_stream = wants_stream
        self._is_framed = self.has_head = self.heard = self.is_whole = self.is_stream = False
        self.status = 0
        self.content_type = b""
        self.retry_after = b""

    def on_message_begin(self) -> None:
        """Stop the parser when a second answer begins: nobody asked for it, and the next request must not get it."""
        if self.is_whole:
            self._refuse("The node answered more than it was asked.")
            raise ValueError

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look at the few headers that matter."""
        lowered = name.lower()
        if lowered not in _MINDED or self.has_head:  # a trailer says nothing
            return
        if lowered == b"content-type":
            self.content_type = value
        elif lowered == b"retry-after":
            self.retry_after = value
        elif lowered == b"content-encoding":
            if value.strip().lower() != b"identity":
                self._refuse("The node compressed its answer although it was asked not to.")
        elif self._is_framed or (lowered == b"transfer-encoding" and value.strip().lower() != b"chunked"):
            self._refuse("The node's answer says in more than one way, or in none we know, where it ends.")
        else:
            self._is_framed = True

    def on_headers_complete(self) -> None:
        """Know what kind of answer it is."""
        status = self.status = self.parser.get_status_code()
        if status < _OK:  # 100 Continue and the like: the answer is still to come
            self.content_type = self.retry_after = b""
            self._is_framed = False
            if status < _CONTINUE or status == _SWITCHING:
                self._refuse(f"The node answered status {status}, which nobody asked for.")
            return
        self.has_head = True
        self.is_stream = self._wants_stream and status == _OK and self.content_type[: len(_STREAM)].lower() == _STREAM

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body."""
        self._parts.append(part)
        self._buffered += len(part)
        self._body_bytes += len(part)
        if self._body_bytes > MAX_ANSWER_BYTES and (not self.is_stream or self._body_bytes > MAX_STREAM_BYTES):
            self._refuse("The node's answer is longer than it may be.")

    def on_message_complete(self) -> None:
        """End the answer, unless it only said that one will come."""
        self.is_whole = self.status >= _OK
        self._keeps_alive = self.parser.should_keep_alive()  # the parser knows it only now

    def _refuse(self, message: str) -> None:
        if self._fault is None:
            self._fault = EgressFault(FaultKind.BAD_RESPONSE, message)
