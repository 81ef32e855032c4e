"""Shared memory in which the workers of one `lucid serve` publish their metrics to each other.

Each worker has a slot and writes to no other, so there are no locks and no waiting. A slot holds two texts, the newest
and the previous: a worker that is killed while it writes leaves the newest one intact. A slot outlives its worker, and
the next worker counts on from it, so counters never decrease. See docs/adr/0017-shared-memory-metrics.md.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from typing import NamedTuple

SLOT_BYTES = 512 * 1024  # of address space; only what is written, some tens of kilobytes, occupies memory
_HALF_BYTES = SLOT_BYTES // 2 - 64
_HEAD = struct.Struct("<II")  # the text's length and its checksum
_TRIES = 5


class SharedSlots:
    """The slots of all workers. Create it before the workers are forked."""

    def __init__(self, count: int) -> None:
        memory = mmap.mmap(-1, count * SLOT_BYTES)
        self._slots = [Slot(memory, number * SLOT_BYTES) for number in range(count)]

    def of_worker(self, number: int) -> WorkerSlot:
        """Return the slots as the worker with this number sees them, counted from 0."""
        return WorkerSlot(own=self._slots[number], all=self._slots)


class WorkerSlot(NamedTuple):
    """The slots as one worker sees them: its own, which it writes, and all, which it reads."""

    own: Slot
    all: list[Slot]


class Slot:
    """What one worker published."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset
        # An item of a memoryview is written in one piece. `struct` writes zeros first: a reader could see them, and a
        # worker that is killed would leave them.
        self._number = memoryview(memory)[offset : offset + 8].cast("Q")

    def write(self, text: bytes) -> None:
        """Replace what is published; only the slot's own worker may.

        Raises:
            ValueError: `text` is longer than half a slot.
        """
        if len(text) > _HALF_BYTES - _HEAD.size:
            raise ValueError(f"{len(text)} bytes do not fit in a slot of the shared memory")
        number = self._number[0] + 1
        start = self._start(number)
        self._memory[start : start + _HEAD.size + len(text)] = _HEAD.pack(len(text), zlib.crc32(text)) + text
        self._number[0] = number

    def read(self) -> bytes | None:
        """Return what is published; None when nothing is."""
        for _ in range(_TRIES):
            number = self._number[0]
            if number == 0:
                return None
            start = self._start(number)
            length, checksum = _HEAD.unpack_from(self._memory, start)
            text = self._memory[start + _HEAD.size : start + _HEAD.size + min(length, _HALF_BYTES)]
            if zlib.crc32(text) == checksum:
                return text
        return None  # it was overwritten during each try, which no worker does

    def _start(self, number: int) -> int:
        return self._offset + 64 + (number % 2) * _HALF_BYTES
