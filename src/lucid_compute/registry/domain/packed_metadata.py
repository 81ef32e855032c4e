"""Metadata of passports in memory. Of its own because it derives from `Mapping`, which mypyc can't compile rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_READ_OFTEN = frozenset({"inferenceUrl", "upstream", "connectivity"})


class PackedMetadata(Mapping[str, Any]):
    """Metadata as the fleet holds it: as JSON text, except the few keys that requests read.

    As Python objects, 32 KiB of JSON can take a megabyte in every replica.
    """

    __slots__ = ("_often", "_text")

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._often = {key: metadata[key] for key in _READ_OFTEN if key in metadata}
        others = {key: value for key, value in metadata.items() if key not in _READ_OFTEN}
        self._text = json.dumps(others, ensure_ascii=False, separators=(",", ":")).encode()

    def __getitem__(self, key: str) -> Any:
        """Return a key's value; this parses the text, except for the keys that requests read."""
        return self._often[key] if key in _READ_OFTEN else json.loads(self._text)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or `default`."""
        return self._often.get(key, default) if key in _READ_OFTEN else json.loads(self._text).get(key, default)

    def __iter__(self) -> Iterator[str]:
        """Yield every key."""
        yield from self._often
        yield from json.loads(self._text)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._often) + len(json.loads(self._text))

    def unpack(self) -> dict[str, Any]:
        """Return all of it, parsed once."""
        return {**json.loads(self._text), **self._often}
