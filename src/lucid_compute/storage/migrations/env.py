"""Alembic's entry: runs the migrations on the connection that the caller opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from lucid_compute.storage import payout_tables, record_tables, webhook_tables

_KNOWN = (record_tables, payout_tables, webhook_tables)  # each adds its tables to the one `metadata`


def run_on(connection: Connection) -> None:
    """Run what is asked for inside one transaction: a migration holds whole or not at all."""
    context.configure(connection=connection, target_metadata=_KNOWN[0].metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


run_on(context.config.attributes["connection"])
