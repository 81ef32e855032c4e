"""A visit to the cluster of a data folder: while its service runs, or with a Postgres that runs for the visit alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lucid_compute.storage.embedded_postgres.cluster import CLUSTER_NAME
from lucid_compute.storage.embedded_postgres.processes import EmbeddedPostgresError
from lucid_compute.storage.embedded_postgres.server import EmbeddedPostgres
from lucid_compute.storage.embedded_postgres.socket_folder import SOCKET_NAME, find_socket_folder, socket_url


@contextmanager
def visit(data_dir: Path) -> Iterator[str]:
    """Answer the URL of the database in a data folder, until the block's end; to be used in the main thread.

    Raises:
        EmbeddedPostgresError: there is none, or it can't be reached, with a sentence that says what to do.
    """
    cluster = data_dir / CLUSTER_NAME
    if not cluster.exists():
        msg = (
            f"There is no database here: LUCID_DATABASE_URL is not set, and the data folder {data_dir} has none. "
            "Go where `lucid serve` was started, name its data folder in LUCID_DATA_DIR, or set LUCID_DATABASE_URL."
        )
        raise EmbeddedPostgresError(msg)
    folder = find_socket_folder(data_dir, cluster.resolve())
    if _is_answered(folder / SOCKET_NAME):
        yield socket_url(folder)
        return
    with EmbeddedPostgres(data_dir) as postgres:
        yield postgres.url()


def _is_answered(path: Path) -> bool:
    """Whether somebody listens at the socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True
