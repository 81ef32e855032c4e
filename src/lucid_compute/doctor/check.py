"""What a check is, and what comes of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import NamedTuple

from lucid_compute.doctor.case import Case


class Verdict(StrEnum):
    """What a check says. A warning is something to mend that keeps no request away by itself."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


class Finding(NamedTuple):
    """What was found, in a sentence; a warning and a failure say how to mend it, in exactly one way."""

    verdict: Verdict
    found: str
    fix: str | None = None
    needs: str | None = None  # the check that did not come out well, so that this one was not asked


class Check(NamedTuple):
    """One question. It is asked only when the checks that it `needs` have neither failed nor been skipped."""

    id: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[Case], Awaitable[Finding | list[Finding]]]


class Result(NamedTuple):
    """A check's finding; a check with several has several results."""

    id: str
    title: str
    finding: Finding


def passed(found: str) -> Finding:
    """Answer that all is well."""
    return Finding(Verdict.PASS, found)


def warned(found: str, fix: str) -> Finding:
    """Answer that something is to be mended."""
    return Finding(Verdict.WARN, found, fix)


def failed(found: str, fix: str) -> Finding:
    """Answer that this keeps requests away."""
    return Finding(Verdict.FAIL, found, fix)


def skipped(why: str, needs: str | None = None) -> Finding:
    """Answer that there was nothing to ask, or that `needs` comes first."""
    return Finding(Verdict.SKIPPED, why, needs=needs)
