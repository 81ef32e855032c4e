"""Alembic's entry: migrates on the connection of the service or of `lucid db`, else on the environment's database."""

from __future__ import annotations

import asyncio
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection

from lucid_compute.cli.settings import data_dir, database_url
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import DatabaseNotUsable
from lucid_compute.postgres.embedded import EmbeddedPostgresError
from lucid_compute.server.schema_tables import metadata


def run_on(connection: Connection) -> None:
    """Run each migration in a transaction of its own, so that no lock is held while later ones work."""
    context.configure(
        connection=connection, target_metadata=metadata, transactional_ddl=True, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


def run_from_the_shell() -> None:
    """Run the `alembic` command on LUCID_DATABASE_URL, or on the Postgres of the data folder.

    Raises:
        CommandError: the database can't be used; the text says what to do.
    """
    fileConfig(context.config.config_file_name or "", disable_existing_loggers=False)
    try:
        with schema.open_database(database_url(), data_dir()) as url:
            asyncio.run(schema.run_locked(url, run_on))
    except (DatabaseNotUsable, EmbeddedPostgresError) as error:
        raise CommandError(str(error)) from None


def print_sql() -> None:
    """Print the statements of `alembic … --sql` without connecting."""
    context.configure(
        dialect_name="postgresql", target_metadata=metadata, transactional_ddl=True, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


opened: Connection | None = context.config.attributes.get("connection")
if opened is not None:
    run_on(opened)
elif context.is_offline_mode():
    print_sql()
else:
    run_from_the_shell()
