"""Lucid compute: a registry of GPU nodes and a router of inference requests to them."""

from lucid_compute.compilation import FORM as FORM  # imported first: later modules may be compiled ones

__version__ = "0.1.0"
