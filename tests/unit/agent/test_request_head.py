"""What an agent lets through to its inference server: the endpoints of inference, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.agent.outbound.request_head import HeadReader, HeadRefused
from lucid_compute.gateway.endpoints import ENDPOINTS

READER = HeadReader("http://127.0.0.1:8000", "the server's key")


def head(first: str, *lines: str, length: str | None = "2") -> bytes:
    told = [first, "Host: node", *lines, *([] if length is None else [f"Content-Length: {length}"])]
    return "\r\n".join([*told, "", ""]).encode()


def test_the_head_is_for_the_local_server_with_its_own_key() -> None:
    sent = head(
        "POST /v1/chat/completions HTTP/1.1",
        "Content-Type: application/json",
        "Authorization: Bearer of the service",
        "X-Forwarded-For: 10.0.0.1",
        "X-Request-Id: 7",
    )
    assert READER.read(sent).head.split(b"\r\n") == [
        b"POST /v1/chat/completions HTTP/1.1",
        b"Host: 127.0.0.1:8000",
        b"Connection: close",
        b"Content-Type: application/json",
        b"X-Request-Id: 7",
        b"Content-Length: 2",
        b"Authorization: Bearer the server's key",
        b"",
        b"",
    ]


def test_every_endpoint_of_the_gateway_passes_below_the_servers_own_base() -> None:
    reader = HeadReader("http://127.0.0.1:8000/proxy/v2", None)
    for name in ENDPOINTS:
        asked = name if name.startswith("/") else f"/v1/{name}"
        wanted = f"/proxy{name}" if name.startswith("/") else f"/proxy/v2/{name}"
        assert reader.read(head(f"POST {asked} HTTP/1.1")).head.startswith(f"POST {wanted} HTTP/1.1\r\n".encode())
    assert reader.read(head("GET /v1/models HTTP/1.1", length="0")).head.startswith(
        b"GET /proxy/v2/models HTTP/1.1\r\n"
    )


@pytest.mark.parametrize(
    "sent",
    [
        head("GET /v1/chat/completions HTTP/1.1"),
        head("POST /v1/models HTTP/1.1"),
        head("POST /slots/0?action=erase HTTP/1.1"),
        head("GET /metrics HTTP/1.1"),
        head("POST /v1/../slots HTTP/1.1"),
        head("POST /v1/chat/completions?x=1 HTTP/1.1"),
        head("POST http://169.254.169.254/v1/chat/completions HTTP/1.1"),
        head("CONNECT 10.0.0.1:22 HTTP/1.1"),
        head("POST /v1/chat/completions HTTP/1.0"),
        head("POST /v1/chat/completions HTTP/1.1\nGET /x HTTP/1.1"),
        head("POST /v1/chat/completions HTTP/1.1", "Transfer-Encoding: chunked"),
        head("POST /v1/chat/completions HTTP/1.1", "Content-Length: 3"),
        head("POST /v1/chat/completions HTTP/1.1", length="-1"),
        head("POST /v1/chat/completions HTTP/1.1", length="99999999999"),
        head("POST /v1/chat/completions HTTP/1.1", length=None),
        head("POST /v1/chat/completions HTTP/1.1", "Accept : x"),
        head("POST /v1/chat/completions HTTP/1.1", "Accept: x\ny"),
    ],
)
def test_anything_else_is_refused(sent: bytes) -> None:
    with pytest.raises(HeadRefused):
        READER.read(sent)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_raises_nothing_else(garbage: bytes) -> None:
    with pytest.raises(HeadRefused):
        READER.read(garbage + b"\r\n\r\n")
