"""Alembic's entry: runs the migrations on the connection that the caller opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from lucid_compute.storage import webhook_tables


def run_on(connection: Connection) -> None:
    """Run what is asked for inside one transaction: a migration holds whole or not at all."""
    context.configure(connection=connection, target_metadata=webhook_tables.metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


run_on(context.config.attributes["connection"])
