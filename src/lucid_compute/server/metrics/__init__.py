"""Prometheus metrics, added up over all workers."""
