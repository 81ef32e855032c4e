"""Payouts: prices become revenue, revenue becomes shares, months are closed."""
