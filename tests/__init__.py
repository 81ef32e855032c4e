"""Tests: unit, integration and acceptance, each in the folders of the packages that they test."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
