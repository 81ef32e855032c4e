"""Accounting: the job ledger, rollups over time, and what is built on them: metrics, overview, payouts."""
