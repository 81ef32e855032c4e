"""Postgres: connections, transactions, the clock, tables, migrations, and the embedded server."""
