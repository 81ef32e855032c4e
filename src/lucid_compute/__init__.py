"""Lucid compute: a registry of GPU nodes and a router of inference requests to them."""

__version__ = "0.1.0"
