"""Faults of a request, field by field: where each is, and what to send instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class FieldFault(NamedTuple):
    """One fault of a request: where it is (`metadata.vram`, `query.page`) and what to send instead."""

    path: str
    message: str


def faults_from(errors: Sequence[Mapping[str, Any]], *prefix: str) -> list[FieldFault]:
    """Answer Pydantic's error list as field faults, each with what to send."""
    return [FieldFault(_path(prefix, error["loc"]), _sentence(error)) for error in errors]


def _path(prefix: tuple[str, ...], loc: Sequence[Any]) -> str:
    """Answer a dotted path, without the names that Pydantic gives the branches of a union."""
    parts = [str(part) for part in loc if not _is_branch(part)]
    return ".".join([*prefix, *parts])


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in _UNION_BRANCHES or "[" in part or "(" in part)


def _sentence(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if message.endswith(".") else f"{message}."


_UNION_BRANCHES = frozenset({"constrained-str", "constrained-float", "RuntimeDescription", "float", "str"})
_SENTENCES = {
    "missing": "Required: send it.",
    "extra_forbidden": "Unknown field: leave it out, or correct its name.",
    "string_pattern_mismatch": "Send text without control characters.",
}
