"""Tests: unit, integration and acceptance, each in the folders of the packages that they test."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The form of the service in this process and in those that tests start: the sources, unless `make test-compiled` says
# otherwise. It is decided when the package is imported, so it comes before every import of it.
FORM = {"LUCID_COMPILED": os.environ.setdefault("LUCID_COMPILED", "false")}

needs_sources = pytest.mark.skipif(FORM["LUCID_COMPILED"] == "true", reason="it replaces a part of a compiled class")
