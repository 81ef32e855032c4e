"""`lucid serve`: what the service is made of, put together and run."""

from __future__ import annotations

import resource
from contextlib import suppress

from lucid_compute.api.app import create_app
from lucid_compute.api.settings import Settings
from lucid_compute.cli.log_lines import configure_log
from lucid_compute.cli.supervisor import Service, Supervisor
from lucid_compute.storage.dedicated_connection import DEDICATED_CONNECTIONS
from lucid_compute.storage.embedded_postgres import EmbeddedPostgres
from lucid_compute.storage.preparation import prepare

MIN_CONNECTIONS = 100
CONNECTIONS_BESIDE_POOL = DEDICATED_CONNECTIONS + 1  # of a worker; Postgres may not know yet that one was cut
CONNECTIONS_FOR_OTHERS = 20  # psql, the preparation, Postgres's own reserve


def run_service(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, on `settings.database_url` or on a Postgres of our own; answers the exit status.

    To be called in the main thread of the outermost process, which has no event loop and no other thread.
    """
    configure_log(settings.log_level)
    _allow_many_sockets()
    return Supervisor(settings, Service(prepare, create_app), _embedded_postgres(settings)).run()


def _allow_many_sockets() -> None:
    """Open as many files as the system allows: each node that beats holds a socket, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited" and takes no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _embedded_postgres(settings: Settings) -> EmbeddedPostgres | None:
    """Answer the Postgres to run, None when there is a database to use."""
    if settings.database_url is not None:
        return None
    per_worker = settings.database_pool_size + CONNECTIONS_BESIDE_POOL
    connections = max(MIN_CONNECTIONS, settings.workers * per_worker + CONNECTIONS_FOR_OTHERS)
    return EmbeddedPostgres(
        settings.data_dir, settings.embedded_postgres_user, options=[f"max_connections={connections}"]
    )
