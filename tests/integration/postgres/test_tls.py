"""TLS to Postgres, as far as it goes without one: what a server's certificate is refused for, and what is advised.

The embedded Postgres has no TLS. docs/operations.md says what was run with one that has.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lucid_compute.postgres.database import DatabaseNotUsable, check_usable
from tests.authority import Authority

REQUEST_BYTES = 8  # of a client that asks for TLS


@asynccontextmanager
async def server_of(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Run a server that agrees to TLS, as Postgres does, and shows its certificate; yield its port."""

    async def agree(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(REQUEST_BYTES)
        writer.write(b"S")
        try:
            await writer.start_tls(context)
        except (ssl.SSLError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(agree, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("name", "is_signed", "advice"),
    [
        ("DNS:elsewhere.example", True, "as its certificate does, or use sslmode=verify-ca"),
        ("DNS:localhost", False, "name the authority's file with sslrootcert=FILE"),
    ],
)
async def test_what_is_wrong_with_a_certificate_is_said_with_what_to_do(
    authority: Authority, name: str, is_signed: bool, advice: str
) -> None:
    """Its name, or who signed it."""
    async with server_of(authority.issue(name, is_signed=is_signed)) as port:
        words = f"sslmode=verify-full&sslrootcert={authority.certificate}"
        with pytest.raises(DatabaseNotUsable) as refused:
            await check_usable(f"postgresql://lucid@localhost:{port}/lucid?{words}")
    assert advice in str(refused.value)


async def test_a_missing_authority_is_said_with_what_to_do(tmp_path_factory: pytest.TempPathFactory) -> None:
    """verify-full needs one."""
    with pytest.raises(DatabaseNotUsable, match=r"sslrootcert"):
        await check_usable(
            f"postgresql://lucid@localhost:1/lucid?sslmode=verify-full&sslrootcert={tmp_path_factory.mktemp('none')}/ca.crt"
        )
