"""Every table in one `metadata`, which Alembic compares a database with. A new file of tables is named here."""

from __future__ import annotations

from lucid_compute.accounting import tables as record_tables
from lucid_compute.accounting.payouts import tables as payout_tables
from lucid_compute.postgres import tables
from lucid_compute.webhooks import tables as webhook_tables

metadata = tables.metadata

_KNOWN = (payout_tables, record_tables, webhook_tables)  # each adds its tables to `metadata` when it is imported
