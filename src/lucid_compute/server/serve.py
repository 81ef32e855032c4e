"""`lucid serve`: builds the supervisor from the settings and runs it."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress
from typing import TYPE_CHECKING

from lucid_compute.postgres.lean_sqlalchemy import leave_out_orm
from lucid_compute.server.logging import configure_log
from lucid_compute.server.settings import Settings

if TYPE_CHECKING:
    from lucid_compute.server.supervisor import Supervisor


def run_service(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, on `settings.database_url` or on an embedded Postgres; return the exit status.

    Call it in the main thread of a process without an event loop and without other threads.
    """
    configure_log(settings.log_level)
    _allow_many_sockets()
    return _build_supervisor(settings).run()


def _build_supervisor(settings: Settings) -> Supervisor:
    """Import the service once, before the workers are forked: they share its memory, and a new one starts fast.

    A garbage collection among modules finds nothing, costs time, and writes to every object: pages that are written to
    are not shared. So there is none before they are frozen.
    """
    gc.disable()
    leave_out_orm()
    from lucid_compute.server.app import create_app  # noqa: PLC0415 - after the two calls above
    from lucid_compute.server.asgi import embedded_postgres  # noqa: PLC0415 - as above
    from lucid_compute.server.preparation import prepare  # noqa: PLC0415 - as above
    from lucid_compute.server.supervisor import ServedProgram, Supervisor  # noqa: PLC0415 - as above

    gc.freeze()
    gc.enable()
    return Supervisor(settings, ServedProgram(prepare, create_app), embedded_postgres(settings))


def _allow_many_sockets() -> None:
    """Allow as many open files as the system does: each node holds a socket, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited" and accepts no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
