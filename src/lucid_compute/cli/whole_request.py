"""A request that came whole in one packet, read by the parser that reads all others, without anything around it."""

from __future__ import annotations

from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

# A request with one of these is not what it seems: it comes in parts, waits for a word of ours, or changes protocol.
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
_CLOSE = b"close"


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
        self._is_over = False
        self.on_header = self._headers.__setitem__  # as the parser's callback, without a frame for each header
        self.on_url = self._urls.append
        self.on_body = self._parts.append
        self._parser = HttpRequestParser(self)

    def on_message_complete(self) -> None:
        """Note that a request was whole."""
        self._is_over = True

    def read(self, data: bytes) -> WholeRequest | None:
        """Answer the request that `data` is; None when it is anything else."""
        try:
            self._parser.feed_data(data)
            return self._found()
        except (HttpParserError, HttpParserUpgrade):
            self._parser = HttpRequestParser(self)
            return None
        finally:
            self._headers.clear()
            self._urls.clear()
            self._parts.clear()
            self._is_over = False

    def _found(self) -> WholeRequest | None:
        parser = self._parser
        is_whole = self._is_over and len(self._urls) == 1 and len(self._parts) <= 1
        if not is_whole or not parser.should_keep_alive() or parser.get_http_version() != "1.1":
            self._parser = HttpRequestParser(self)  # it may be in the middle of something
            return None
        headers = {name.lower(): value for name, value in self._headers.items()}
        if not _UNUSUAL.isdisjoint(headers):
            return None
        return WholeRequest(self._urls[0], headers, self._parts[0] if self._parts else b"")
