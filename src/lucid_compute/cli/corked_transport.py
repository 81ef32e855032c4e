"""A transport that writes the head of an answer together with what comes next: one system call, and one packet."""

from __future__ import annotations

import asyncio
from typing import Any

_HEAD = b"HTTP/1.1 "
_INFORMATIONAL = b"HTTP/1.1 1"


class CorkedTransport:
    """uvicorn writes an answer's head by itself; held until the body comes, it saves a third of a request's writes.

    Whoever ends an answer without a body has to `flush`. Everything else is the transport's own.
    """

    __slots__ = ("_held", "_transport", "abort", "get_extra_info", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        """Write to `transport`."""
        self._transport = transport
        self._held = b""
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        """Answer what is the transport's own."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write what was held and `data`; hold it if it begins with the head of a final answer."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif data.startswith(_HEAD) and not data.startswith(_INFORMATIONAL):
            self._held = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what was held."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def write_eof(self) -> None:
        """Write what was held, and end our side."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Write what was held, and close."""
        self.flush()
        self._transport.close()
