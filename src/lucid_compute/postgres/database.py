"""Connections to Postgres: URLs, session settings, the pool with bounded transactions, and checks of a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from lucid_compute.errors import DatabaseUnavailable

OLDEST_SERVER = (14, 0)
CONNECT_TIMEOUT_SECONDS = 2.0
SLOW_CONNECT_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 0.2
LOCK_TIMEOUT_SECONDS = 2.0

# Set after connecting, because a session pool accepts few start-up parameters.
_SESSION = """
    SET jit = off; SET timezone = 'UTC'; SET bytea_output = 'hex'; SET lock_timeout = {lock_timeout};
    SET idle_in_transaction_session_timeout = 10000;
    SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
"""

# Classes of SQLSTATE for faults that pass: connection, insufficient resources (such as a full disk), operator
# intervention, system error, and a transaction that lost against another one.
_TRANSIENT_SQLSTATES = ("08", "53", "57", "58", "40", "25006", "55P03")
_CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    PoolTimeoutError,
)


class DatabaseNotUsable(Exception):
    """The database can't be used as configured; the text says what to change."""


def normalise_url(url: str) -> str:
    """Return the URL with the scheme that asyncpg takes, for any Postgres scheme.

    Raises:
        DatabaseNotUsable: `url` is not a Postgres URL.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        message = "LUCID_DATABASE_URL can't be read. Percent-encode its password: %2F stands for /, %23 for #."
        raise DatabaseNotUsable(message) from None
    if parts.scheme.split("+")[0] not in {"postgres", "postgresql"}:
        message = "LUCID_DATABASE_URL must look like postgresql://user:password@host:5432/database."
        raise DatabaseNotUsable(message)
    return urlunsplit(parts._replace(scheme="postgresql"))


class _Connection(asyncpg.Connection):
    """A connection whose `close` takes at most `CLOSE_TIMEOUT_SECONDS`, also when Postgres hangs."""

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's signature
        """Close politely for a fifth of a second, then cut the connection."""
        with suppress(TimeoutError):  # asyncpg has cut the connection by then
            await super().close(timeout=min(timeout or CLOSE_TIMEOUT_SECONDS, CLOSE_TIMEOUT_SECONDS))


async def connect(
    url: str,
    *,
    application: str = "lucid",
    session: str = "",
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
    timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
) -> asyncpg.Connection[asyncpg.Record]:
    """Return an open connection; `session` is SQL that runs on it first.

    The session settings make Postgres end the transaction and the locks of a vanished replica within seconds.
    """
    connection = await asyncpg.connect(
        normalise_url(url),
        timeout=timeout_seconds,
        server_settings={"application_name": application},
        connection_class=_Connection,
    )
    try:
        await connection.execute(_SESSION.format(lock_timeout=int(lock_timeout_seconds * 1000)) + session)
    except BaseException:  # also when cancelled: no one else can close it
        connection.terminate()
        raise
    return connection


def is_transient(error: BaseException) -> bool:
    """Return whether the database can't respond now, as opposed to a statement that is wrong."""
    if isinstance(error, _CONNECTION_ERRORS):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or is_transient(_original(error))
    sqlstate = getattr(error, "sqlstate", None) or ""
    return sqlstate.startswith(_TRANSIENT_SQLSTATES)


def constraint_of(error: DBAPIError) -> str | None:
    """Return the name of the constraint that a statement violated; None if the error is another one."""
    return getattr(_original(error), "constraint_name", None)


def _original(error: DBAPIError) -> BaseException:
    """Return asyncpg's own exception behind SQLAlchemy's and its dialect's."""
    original: BaseException = error.orig or error
    return original.__cause__ or original


class Database:
    """The connection pool for ordinary requests. Every transaction is bounded by `timeout_seconds`."""

    def __init__(
        self, url: str, *, application: str = "lucid", pool_size: int = 5, timeout_seconds: float = 2.0
    ) -> None:
        """Create a pool of `pool_size` connections; none is opened yet."""
        self.url = normalise_url(url)
        self.timeout_seconds = timeout_seconds
        self._engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(self.url, application=application),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=timeout_seconds,
            pool_recycle=1800,
            hide_parameters=True,  # they may contain a node's key, and errors are logged
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that commits when the block ends, and rolls back when it raises.

        Raises:
            DatabaseUnavailable: Postgres did not respond in time; whether the commit succeeded is not known.
        """
        try:
            async with asyncio.timeout(self.timeout_seconds), self._engine.begin() as connection:
                yield connection
        except (OSError, TimeoutError, SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if is_transient(error):
                raise DatabaseUnavailable from error
            raise

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


async def check_usable(url: str) -> None:
    """Refuse a database that is too old, is not in UTF-8, or is behind a proxy that pools transactions.

    A proxy that pools transactions may give each of them another server process, so LISTEN and session locks silently
    fail. It shows when a second client, inside a transaction, is given the process that the first one just used.

    Raises:
        DatabaseNotUsable: the text says what to change.
    """
    try:
        first = await connect(url, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
        second = await connect(url, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        message = f"The database could not be reached ({error}). Is it running, and is LUCID_DATABASE_URL right?"
        raise DatabaseNotUsable(message) from error
    try:
        await _refuse_old_server(first)
        await _refuse_transaction_pool(first, second)
        await _refuse_other_encodings(first)
    finally:
        await first.close()
        await second.close()


async def _refuse_old_server(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    version = connection.get_server_version()
    if (version.major, version.minor) < OLDEST_SERVER:
        message = f"Postgres {version.major} is too old; lucid-compute needs Postgres {OLDEST_SERVER[0]} or newer."
        raise DatabaseNotUsable(message)


async def _refuse_other_encodings(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    encoding = await connection.fetchval("SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        message = f"This database's encoding is {encoding}, which can't hold every name. Make one with ENCODING 'UTF8'."
        raise DatabaseNotUsable(message)


async def _refuse_transaction_pool(
    first: asyncpg.Connection[asyncpg.Record], second: asyncpg.Connection[asyncpg.Record]
) -> None:
    try:
        process = await first.fetchval("SELECT pg_backend_pid()")
        async with second.transaction():
            other = await second.fetchval("SELECT pg_backend_pid()")
            is_pooled = process == other or process != await first.fetchval("SELECT pg_backend_pid()")
    except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError):
        is_pooled = True  # a statement was prepared in one server process and looked for in another
    if is_pooled:
        raise DatabaseNotUsable(
            "LUCID_DATABASE_URL leads through a proxy that pools transactions (PgBouncer's pool_mode=transaction, for "
            "example). lucid-compute needs session connections: point it at Postgres itself, or at a session pool."
        )
