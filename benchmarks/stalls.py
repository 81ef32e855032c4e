"""The worst /healthz of a worker while one client sends what costs most to read: a few seconds for all of it.

Each input is as large as its limit allows. The column of the processor is what the worker spent on it, so it shows on a
busy machine as well what a quiet one would have waited.
"""

from __future__ import annotations

import gzip
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field

from benchmarks.servers import ADMIN_KEY, Server, data_folder, describe_cores, lucid_serve, wait_for_quiet

MIB = 1024 * 1024
PACKET_BYTES = 256_000
CHUNKED = b"POST /healthz HTTP/1.1\r\nHost: lucid\r\nTransfer-Encoding: chunked\r\n\r\n"
GOAL_SECONDS = 0.1
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: lucid\r\n\r\n"


def _packet(begin: bytes, again: bytes) -> bytes:
    """Return one read's worth of the same again and again."""
    return begin + again * ((PACKET_BYTES - len(begin)) // len(again))


def _post(path: str, body: bytes, *headers: str, key: str | None = ADMIN_KEY) -> bytes:
    """Return the bytes of a request after which the connection ends."""
    lines = [f"POST {path} HTTP/1.1", "Host: lucid", f"Content-Length: {len(body)}", "Connection: close", *headers]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _list(size: int, brick: bytes, key: bytes = b"a") -> bytes:
    """Return an object with a list of bricks, of about `size` bytes."""
    count = (size - len(key) - 8) // (len(brick) + 1)
    return b'{"%b":[%b]}' % (key, b",".join([brick] * count))


def _keys(size: int, begin: bytes = b"") -> bytes:
    """Return an object of about `size` bytes with as many keys as possible."""
    return b"{%b%b}" % (begin, b",".join(b'"k%d":0' % number for number in range(size // 12)))


def _chat(fields: bytes) -> bytes:
    """Return a chat's body with these fields before the others."""
    return b'{"model":"none",%b,"messages":[]}' % fields


_LAST = b"GET / HTTP/1.1\r\nHost:a\r\nConnection:close\r\n\r\n"
CONNECTIONS = {
    "nothing unusual": _LAST,
    "CONNECT": b"CONNECT a:1 HTTP/1.1\r\n\r\n" * 50,
    "pipelined requests": b"GET / HTTP/1.1\r\nHost:a\r\n\r\n" * 500 + _LAST,
    "pipelined upgrades": b"GET / HTTP/1.1\r\nHost:a\r\nConnection:upgrade\r\nUpgrade:x\r\n\r\n" * 500 + _LAST,
    "headers": _packet(b"GET / HTTP/1.1\r\nHost:a\r\n", b"a:\r\n"),
    "chunks of one byte": _packet(CHUNKED, b"1\r\na\r\n"),
    "trailers": _packet(CHUNKED + b"1\r\na\r\n0\r\n", b"a:\r\n"),
    "a query": b"GET /models?" + b"a&" * 8000 + b" HTTP/1.1\r\nHost:a\r\nConnection:close\r\n\r\n",
    "a path": b"GET /models/" + b"a/" * 8000 + b" HTTP/1.1\r\nHost:a\r\nConnection:close\r\n\r\n",
}
_KEYS_OF_ONE = b",".join(b'"k%d":0' % number for number in range(18))
BODIES = {
    "no key": _post("/passports", _list(MIB, b"0"), key=None),
    "no route": _post("/nothing", _list(MIB, b"0", b"k" * (MIB // 2))),
    "numbers": _post("/passports", _list(MIB, b"0")),
    "numbers below a long key": _post("/passports", _list(MIB, b"0", b"k" * (MIB // 2))),
    "as many numbers as may be": _post("/passports", _list(40_000, b"0", b"k" * (MIB // 2))),
    "unknown keys": _post("/passports", _keys(60_000)),
    "unknown keys of models": _post(
        "/compute/models/none",
        _list(220_000, b'{"id":"m",%b}' % b",".join(b'"k%d":0' % n for n in range(18)), b"models"),
    ),
    "a bomb": _post("/passports", gzip.compress(bytes(500 * MIB), 9)[:MIB], "Content-Encoding: gzip"),
    "a heartbeat of models": _post("/compute/heartbeat", _list(MIB, b"0", b"availableModels")),
    "a heartbeat of unknown keys": _post("/compute/heartbeat", _keys(MIB)),
}
_OPTIONS = b"".join(b'"k%d":0,' % number for number in range(100_000))
GATEWAY = {
    "numbers": _post("/v1/chat/completions", _chat(b'"a":[%b0]' % (b"0," * (16 * MIB)))),
    "lists": _post("/v1/chat/completions", _chat(b'"a":[%b[]]' % (b"[]," * (10 * MIB)))),
    "keys and an escape": _post("/v1/chat/completions", _chat(b'"x":"\\u0061",' + _keys(4 * MIB)[1:-1])),
    "unknown keys of lucid": _post("/v1/chat/completions", _chat(b'"lucid":' + _keys(MIB))),
    "a key of stream_options twice": _post(
        "/v1/chat/completions", _chat(b'"x":"\\u0061","stream_options":{%b"z":0,"z":1}' % _OPTIONS)
    ),
    "a prompt of escapes": _post("/v1/chat/completions", _chat(b'"a":"%b"' % (b"\\u0061" * (5 * MIB)))),
}


@dataclass
class Pulse:
    """Asks for /healthz without a pause on a connection of its own, and remembers the longest wait."""

    port: int
    worst_seconds: float = 0.0
    _ends: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Ask until told to end."""
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=60)) as connection:
            while not self._ends.is_set():
                began = time.monotonic()
                connection.sendall(HEALTHZ)
                connection.recv(65536)
                self.worst_seconds = max(self.worst_seconds, time.monotonic() - began)
                time.sleep(0.002)

    def end(self) -> None:
        """End after the next response."""
        self._ends.set()


def _send(server: Server, data: bytes) -> None:
    """Send it, and read what comes until it has been served or refused."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=2)) as connection:
        sending = threading.Thread(target=_send_all, args=(connection, data), daemon=True)
        sending.start()
        try:
            while connection.recv(65536):
                pass
        except OSError:
            return
        finally:
            sending.join(5)


def _send_all(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return


def measure(server: Server, data: bytes) -> tuple[float, float]:
    """Return the worst /healthz while `data` is served, and the processor time spent meanwhile, in seconds."""
    pulse = Pulse(server.port)
    asking = threading.Thread(target=pulse.run, daemon=True)
    before = server.cpu_seconds()
    asking.start()
    _send(server, data)
    pulse.end()
    asking.join(60)
    return pulse.worst_seconds, server.cpu_seconds() - before


def main() -> None:
    """Send each input once, and print the worst /healthz meanwhile."""
    with data_folder() as folder, lucid_serve(folder, auth_failures_per_minute="0") as server:
        print(f"{describe_cores()}; goal: no /healthz over {GOAL_SECONDS * 1000:.0f} ms")
        wait_for_quiet()
        measure(server, HEALTHZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        for kind, inputs in (("connection", CONNECTIONS), ("body", BODIES), ("below /v1", GATEWAY)):
            for name, data in inputs.items():
                worst, spent = measure(server, data)
                mark = "" if worst < GOAL_SECONDS else "   over the goal"
                figures = f"{len(data):>12,} B{worst * 1000:9.1f} ms{spent * 1000:9.0f} ms of processor"
                print(f"{kind:12s}{name:32s}{figures}{mark}", flush=True)


if __name__ == "__main__":
    main()
