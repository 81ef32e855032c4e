"""What nodes and upstreams are asked with and nobody is told: held beside the passports, so that no record shows it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NONE: Mapping[str, Any] = MappingProxyType({})


class Secrets:
    """The secrets of nodes and models by passport id, each under its passport's revision."""

    def __init__(self) -> None:
        """Start with none."""
        self._held: dict[str, tuple[int, Mapping[str, Any]]] = {}

    def __repr__(self) -> str:
        """Say whose secrets are held, and none of them."""
        return f"Secrets(of {len(self._held)} passports)"

    def apply(self, passport_id: str, revision: int, secrets: Mapping[str, Any]) -> None:
        """Hold the passport's secrets if newer than the ones held; an empty mapping forgets them.

        Its revision is kept, so that a late sight of the former secrets does not bring them back.
        """
        held = self._held.get(passport_id)
        if held is not None and revision > held[0]:
            self._held[passport_id] = (revision, secrets or _NONE)
        elif held is None and secrets:
            self._held[passport_id] = (revision, secrets)

    def of(self, passport_id: str) -> Mapping[str, Any]:
        """Answer the passport's secrets: `inferenceKey` of a node, `upstreamApiKey` of a model; empty when none."""
        held = self._held.get(passport_id)
        return _NONE if held is None else held[1]

    def forget(self, passport_id: str) -> None:
        """Drop the secrets of a node or a model that is dropped itself."""
        self._held.pop(passport_id, None)
