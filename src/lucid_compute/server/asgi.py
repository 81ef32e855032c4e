"""The service for any ASGI server: `uvicorn --factory lucid_compute.server.asgi:create`.

`lucid serve` does more: it restarts workers and Postgres, and passes requests on to the lanes without ASGI.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive, Scope, Send

from lucid_compute.postgres.dedicated_connection import DEDICATED_CONNECTIONS
from lucid_compute.postgres.embedded import EmbeddedPostgres
from lucid_compute.server.app import LucidApp, create_app
from lucid_compute.server.preparation import Prepared, prepare, sentence_of
from lucid_compute.server.settings import Settings, SettingsNotUsable, read_settings

# The server decides where to listen. Nodes on this machine are allowed only if LUCID_HOST says that it is loopback.
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - compared, not bound
MIN_CONNECTIONS = 100
CONNECTIONS_BESIDE_POOL = (
    DEDICATED_CONNECTIONS + 1
)  # of a worker; one more, since Postgres may not have noticed yet that one was cut
CONNECTIONS_FOR_OTHERS = 20  # psql, the preparation, Postgres's own reserve

log = logging.getLogger(__name__)


def create() -> PreparedApp:
    """Return the application, with the settings of the environment.

    Raises:
        SystemExit: settings are not usable, with a sentence for each.
    """
    try:
        settings = read_settings()
    except SettingsNotUsable as error:
        raise SystemExit(str(error)) from None
    if "host" not in settings.model_fields_set:
        settings = settings.model_copy(update={"host": ANY_ADDRESS})
    return PreparedApp(settings)


class PreparedApp:
    """One replica. Its lifespan prepares the database: that of LUCID_DATABASE_URL, else an embedded Postgres.

    Replicas may start together: one migrates, the others wait. With the embedded Postgres there is one process, and
    the lifespan runs in its main thread; several processes need a LUCID_DATABASE_URL.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: LucidApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or run the lifespan."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif self._app is None:
            raise RuntimeError("The ASGI server must run the lifespan: with uvicorn, --lifespan on.")
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the lifespan; a database that can't be used ends it with one sentence."""
        try:
            with _database(self._settings) as url:
                _print_admin_key(await self._prepare(url))
                self._app = create_app(self._settings, url)
                await self._app(scope, receive, send)
        except Exception as error:
            if self._app is not None:
                raise
            log.debug("the preparation failed", exc_info=True)
            await send({"type": "lifespan.startup.failed", "message": sentence_of(error)})

    async def _prepare(self, url: str) -> Prepared:
        key = self._settings.bootstrap_admin_key
        return await prepare(
            url,
            data_dir=self._settings.data_dir.absolute(),
            bootstrap_admin_key=key.get_secret_value() if key else None,
            terms=self._settings.terms,
        )


def embedded_postgres(settings: Settings) -> EmbeddedPostgres | None:
    """Return the Postgres to run; None when the settings name a database."""
    if settings.database_url is not None:
        return None
    per_worker = settings.database_pool_size + CONNECTIONS_BESIDE_POOL
    connections = max(MIN_CONNECTIONS, settings.workers * per_worker + CONNECTIONS_FOR_OTHERS)
    return EmbeddedPostgres(
        settings.data_dir, settings.embedded_postgres_user, options=[f"max_connections={connections}"]
    )


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """Yield the URL of the database; an embedded Postgres runs until the block ends."""
    postgres = embedded_postgres(settings)
    if postgres is None:
        yield settings.database_url.get_secret_value() if settings.database_url else ""
        return
    with postgres:
        yield postgres.url()


def _print_admin_key(prepared: Prepared) -> None:
    """Print the first admin key once, on stdout as `lucid serve` does. Logs would keep it too long."""
    if prepared.admin_key is not None:
        kept = f"kept in {prepared.admin_key_file}" if prepared.admin_key_file else "keep it"
        print(f"admin key  {prepared.admin_key} (shown this once, {kept})", flush=True)  # noqa: T201 - not for a log
