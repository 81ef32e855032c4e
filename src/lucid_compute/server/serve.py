"""`lucid serve`: builds the supervisor from the settings and runs it."""

from __future__ import annotations

import resource
from contextlib import suppress

from lucid_compute.server.app import create_app
from lucid_compute.server.asgi import embedded_postgres
from lucid_compute.server.logging import configure_log
from lucid_compute.server.preparation import prepare
from lucid_compute.server.settings import Settings
from lucid_compute.server.supervisor import ServedProgram, Supervisor


def run_service(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, on `settings.database_url` or on an embedded Postgres; return the exit status.

    Call it in the main thread of a process without an event loop and without other threads.
    """
    configure_log(settings.log_level)
    _allow_many_sockets()
    return Supervisor(settings, ServedProgram(prepare, create_app), embedded_postgres(settings)).run()


def _allow_many_sockets() -> None:
    """Allow as many open files as the system does: each node holds a socket, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited" and accepts no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
