"""Egress: all HTTP connections from this service to providers, whose names and responses are not trusted."""
