"""Accounting: the job ledger, rollups by minute, hour and day, and what reads them: metrics, overview, payouts."""
