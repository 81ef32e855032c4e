"""A request that came whole, or nearly, read by the parser that reads all others, without anything around it."""

from __future__ import annotations

from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

# A request with one of these is not what it seems: it comes in parts, waits for a word of ours, or changes protocol.
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})


class WholeRequest(NamedTuple):
    """A request of HTTP/1.1 after which the connection stays open. Names of headers are in lower case."""

    path: bytes
    headers: dict[bytes, bytes]
    body: bytes


class WholeRequestReader:
    """Reads such requests one after another; what is not one leaves nothing behind."""

    def __init__(self) -> None:
        """Have read nothing."""
        self._headers: dict[bytes, bytes] = {}
        self._urls: list[bytes] = []
        self._parts: list[bytes] = []
        self._is_fit = self._is_over = False
        self._begun = 0
        self.on_header = self._headers.__setitem__  # as the parser's callback, without a frame for each header
        self.on_url = self._urls.append
        self.on_body = self._parts.append
        self._parser = HttpRequestParser(self)

    def on_message_begin(self) -> None:
        """Count it: of a request behind the first, a letter may be all that has come."""
        self._begun += 1

    def on_headers_complete(self) -> None:
        """Note that the headers are whole, and whether they are of a request that can be served here."""
        parser = self._parser  # it has forgotten both when the request is over
        self._is_fit = parser.should_keep_alive() and parser.get_http_version() == "1.1"

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        self._is_over = True

    def read(self, data: bytes) -> WholeRequest | int | None:
        """Answer the request that `data` is, or how many bytes of its body are missing; None for anything else."""
        try:
            self._parser.feed_data(data)
            found = self._found(data)
        except (HttpParserError, HttpParserUpgrade):
            found = None
        if not isinstance(found, WholeRequest):
            self._parser = HttpRequestParser(self)  # it may be in the middle of something
        self._headers.clear()
        self._urls.clear()
        self._parts.clear()
        self._is_fit = self._is_over = False
        self._begun = 0
        return found

    def _found(self, data: bytes) -> WholeRequest | int | None:
        parts = self._parts
        if not self._is_fit or self._begun != 1:
            return None
        headers = {name.lower(): value for name, value in self._headers.items()}
        # Nor is one in which a header stands twice, in whatever case: which of the two counts is said in one place.
        if not _UNUSUAL.isdisjoint(headers) or len(headers) != data.count(b"\r\n", 0, data.find(b"\r\n\r\n")):
            return None
        if not self._is_over:
            return int(headers.get(b"content-length", b"0")) - sum(map(len, parts))
        return WholeRequest(self._urls[0], headers, parts[0] if len(parts) == 1 else b"".join(parts))
