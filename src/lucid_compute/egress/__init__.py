"""Egress: the one way out to providers, which trusts neither their names nor their answers."""
