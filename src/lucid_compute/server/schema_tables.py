"""All tables in one `metadata`, which Alembic compares with a database. Add each new file of tables here."""

from __future__ import annotations

from lucid_compute.accounting import tables as accounting_tables
from lucid_compute.accounting.payouts import tables as payout_tables
from lucid_compute.postgres import tables
from lucid_compute.webhooks import tables as webhook_tables

metadata = tables.metadata

_KNOWN = (payout_tables, accounting_tables, webhook_tables)  # each adds its tables to `metadata` on import
