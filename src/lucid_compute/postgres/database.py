"""Connections to Postgres: URLs, session settings, the pool with bounded transactions, and checks of a database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.connection_url import ConnectionTarget, Server, normalise_url, read_target
from lucid_compute.postgres.connection_url import DatabaseNotUsable as DatabaseNotUsable

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
# intervention, system error, a transaction that lost against another one, and a full queue of notifications, as when a
# listening replica is stopped for long.
_TRANSIENT_SQLSTATES = ("08", "53", "57", "58", "40", "25006", "55P03", "54000")
# Faults after which a session is of no more use: the server shuts down, or it takes no writes (any more).
_LOST_SESSION_SQLSTATES = ("25006", "57P0")
_CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    PoolTimeoutError,
)
# What a call of the driver may raise.
_DRIVER_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_GENERAL_ADVICE = "Is it running, and is LUCID_DATABASE_URL right?"
# By a part of what the driver or the server says of a connection that failed.
_ADVICE = {
    "certificate is not valid for": "Name the server in LUCID_DATABASE_URL as its certificate does, or use "
    "sslmode=verify-ca, which compares no names.",
    "CERTIFICATE_VERIFY_FAILED": "Its certificate is from an authority that is not trusted here: name the authority's "
    "file with sslrootcert=FILE in LUCID_DATABASE_URL, or sslrootcert=system for the public ones.",
    "root certificate file": "Name the authority's file with sslrootcert=FILE in LUCID_DATABASE_URL, or "
    "sslrootcert=system for the public ones.",
    "valid client certificate": "Name the certificate and its key with sslcert=FILE and sslkey=FILE in "
    "LUCID_DATABASE_URL.",
    "no pg_hba.conf entry": "The server does not let this user in from here, or not without TLS: see its pg_hba.conf, "
    "and sslmode in LUCID_DATABASE_URL.",
    "password authentication failed": "Correct the user or the password in LUCID_DATABASE_URL; percent-encode signs "
    "such as @ and /.",
    "ConnectionResetError": "Is it running? With sslnegotiation=direct it has to be Postgres 17 or newer.",
}
_log = logging.getLogger(__name__)
_last_used: dict[str, Server] = {}


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
    """Return an open connection to the first server that takes writes; `session` is SQL that runs on it first.

    Each server gets a part of `timeout_seconds`, so that one that does not answer leaves time for the next. The session
    settings make Postgres end the transaction and the locks of a vanished replica within seconds.
    """
    target = read_target(url)
    if target.application_prefix:
        application = f"{target.application_prefix} {application}"
    if target.search_path is not None:
        session = f"SET search_path = {_quote(target.search_path)}; {session}"
    connection = await _connect_to_any(target, application, target.connect_timeout_seconds or timeout_seconds)
    try:
        await connection.execute(_SESSION.format(lock_timeout=int(lock_timeout_seconds * 1000)) + session)
    except BaseException:  # also when cancelled: no one else can close it
        connection.terminate()
        raise
    return connection


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


async def _connect_to_any(
    target: ConnectionTarget, application: str, timeout_seconds: float
) -> asyncpg.Connection[asyncpg.Record]:
    """Return a connection to the first server that can be used, beginning with the one that could be used last.

    Raises:
        Exception: the error of the last server that was tried.
    """
    last_used = _last_used.get(target.url)
    servers = sorted(target.servers, key=lambda server: server != last_used)
    for left in range(len(servers), 0, -1):
        server, began = servers[-left], time.monotonic()
        try:
            connection = await asyncpg.connect(
                target.url,
                host=server.host,
                port=server.port,
                timeout=timeout_seconds / left,
                server_settings={"application_name": application},
                connection_class=_Connection,
            )
        except Exception as error:
            if left == 1 or not is_transient(error):
                raise
            timeout_seconds -= time.monotonic() - began
        else:
            _last_used[target.url] = server
            return connection
    raise AssertionError  # there is a server


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


def sqlstate_of(error: BaseException) -> str:
    """Return Postgres's code of the error; an empty text if it did not come from Postgres."""
    original = _original(error) if isinstance(error, DBAPIError) else error.__cause__ or error
    return getattr(original, "sqlstate", None) or ""


def _original(error: DBAPIError) -> BaseException:
    """Return asyncpg's own exception behind SQLAlchemy's and its dialect's."""
    original: BaseException = error.orig or error
    return original.__cause__ or original


def _drop_lost_sessions(context: ExceptionContext) -> None:
    """Have SQLAlchemy drop the pool's sessions whose server is gone or has become a standby."""
    is_lost = sqlstate_of(context.original_exception).startswith(_LOST_SESSION_SQLSTATES)
    context.is_disconnect = context.is_disconnect or is_lost


class Database:
    """The connection pool for ordinary requests. A transaction takes at most `timeout_seconds`, and so does its wait.

    The wait has a bound of its own: a transaction that is cut for want of time costs its connection, so one that began
    with the rest of its time would make the next ones wait longer still.

    When Postgres says that it shuts down or takes no writes, every connection of the pool is replaced before its next
    use: the others lead to the same server.
    """

    def __init__(
        self,
        url: str,
        *,
        application: str = "lucid",
        pool_size: int = 5,
        timeout_seconds: float = 2.0,
        renewed_seconds: float = 1800.0,
    ) -> None:
        """Create a pool of `pool_size` connections; none is opened yet. After `renewed_seconds` one is replaced."""
        self.url = normalise_url(url)
        self.timeout_seconds = timeout_seconds
        self._engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(self.url, application=application),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=timeout_seconds,
            pool_recycle=int(renewed_seconds),
            hide_parameters=True,  # they may contain a node's key, and errors are logged
        )
        event.listen(self._engine.sync_engine, "handle_error", _drop_lost_sessions)

    @asynccontextmanager
    async def transaction(self, *, times: float = 1.0) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that commits when the block ends, and rolls back when it raises.

        It may take `times` the time limit: more for one that writes many rows. The wait for a free connection before it
        may take the time limit once.

        Raises:
            DatabaseUnavailable: Postgres did not respond in time; whether the commit succeeded is not known.
        """
        try:
            async with (
                self._engine.connect() as connection,  # waits for a free one
                asyncio.timeout(self.timeout_seconds * times),
                connection.begin(),
            ):
                yield connection
        except (SQLAlchemyError, *_DRIVER_ERRORS) as error:
            if is_transient(error):
                raise DatabaseUnavailable from error
            raise

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


async def write_nothing(connection: AsyncConnection) -> None:
    """Execute a write of no row, which a session that is read-only refuses. Nothing waits for its lock."""
    await connection.execute(text("UPDATE replicas SET seen_at = seen_at WHERE false"))


def explain_unavailable(error: BaseException | None) -> str:
    """Return a sentence about why the database could not be used; `error` may be what the driver raised."""
    cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
    original = _original(cause) if isinstance(cause, DBAPIError) else cause
    if isinstance(original, asyncpg.TargetServerAttributeNotMatched) or getattr(original, "sqlstate", "") == "25006":
        return "The database takes no writes: it is a standby, or default_transaction_read_only is on."
    if isinstance(original, asyncpg.PostgresError):
        return f"The database says: {original.message}."
    return "The database does not answer in time."


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
    except _DRIVER_ERRORS as error:
        raise DatabaseNotUsable(_explain(error)) from error
    for note in read_target(url).notes:
        _log.info(note)
    try:
        await _refuse_old_server(first)
        await _refuse_transaction_pool(first, second)
        await _refuse_other_encodings(first)
    finally:
        await first.close()
        await second.close()


def _explain(error: Exception) -> str:
    """Return a sentence about a database that can't be connected to."""
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return (
            "Every server that LUCID_DATABASE_URL names is read-only or a standby, and the service writes. Name the "
            "primary too, and look at default_transaction_read_only."
        )
    if isinstance(error, asyncpg.UndefinedObjectError | asyncpg.CantChangeRuntimeParamError | asyncpg.ProtocolError):
        return f"LUCID_DATABASE_URL has a word that Postgres refuses ({error}). Remove it from the URL."
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"The database could not be reached ({reason}). {_advise(reason)}"


def _advise(reason: str) -> str:
    """Return what to do about a connection that failed, by what the driver or the server said."""
    return next((advice for part, advice in _ADVICE.items() if part in reason), _GENERAL_ADVICE)


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
    except asyncpg.ConnectionDoesNotExistError as error:
        if "statement pooling" not in str(error):
            raise
        is_pooled = True
    if is_pooled:
        raise DatabaseNotUsable(
            "LUCID_DATABASE_URL leads through a proxy that pools transactions or statements (PgBouncer's "
            "pool_mode=transaction, for example). lucid-compute needs session connections: point it at Postgres "
            "itself, or at a session pool."
        )
