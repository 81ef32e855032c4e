"""Which GPUs the inference server uses: those of `--gpus`, else those that CUDA_VISIBLE_DEVICES shows. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

_ENTRY = re.compile(r"\d{1,3}(:\d{1,2})?|(GPU|MIG)-[\w/-]{1,100}", re.ASCII)


class GpuSelection(NamedTuple):
    """The GPUs to read, as indices (`0`), places of MIG slices (`0:1`) and UUIDs (`GPU-…`, `MIG-…`); None: all.

    With `is_of_cuda` they are read as CUDA does: up to the first one that is not there, and one MIG slice at most.
    """

    entries: tuple[str, ...] | None = None
    is_of_cuda: bool = False

    @property
    def hides_all(self) -> bool:
        """Return whether no GPU is selected."""
        return self.entries == ()


ALL_GPUS = GpuSelection()


def read_entries(text: str) -> tuple[str, ...]:
    """Return the GPUs that a list with commas names.

    Raises:
        ValueError: an entry is neither an index nor a UUID.
    """
    entries = tuple(entry.strip() for entry in text.split(","))
    if not all(map(_ENTRY.fullmatch, entries)):
        raise ValueError("Write the indices or UUIDs of GPUs with commas, such as 0,1 or GPU-… or MIG-….")
    return tuple(dict.fromkeys(entries))


def read_cuda_list(text: str) -> GpuSelection:
    """Return what CUDA_VISIBLE_DEVICES selects. CUDA ignores everything from the first invalid entry on, such as -1."""
    entries: dict[str, None] = {}
    for entry in map(str.strip, text.split(",")):
        if not _ENTRY.fullmatch(entry):
            break
        entries[entry] = None
    return GpuSelection(tuple(entries), is_of_cuda=True)
