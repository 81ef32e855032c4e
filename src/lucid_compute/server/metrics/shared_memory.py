"""The board on which the workers of one `lucid serve` show each other what they counted: memory that they share.

Each worker has a place and writes to no other, so nothing is ever locked, and none waits for another. A place holds two
texts, the newest and the one before; a worker that is killed while it writes leaves the newest as it was. What is in a
place outlives its worker, and the next one there counts on from it: so what was once answered never gets less.
"""

from __future__ import annotations

import mmap
import struct
import zlib

PLACE_BYTES = 512 * 1024  # of address space: memory is taken by what is written, some tens of kilobytes
_HALF_BYTES = PLACE_BYTES // 2 - 64
_HEAD = struct.Struct("<II")  # the text's length and its checksum
_TRIES = 5


class SharedSlots:
    """The places of all workers; to be made before they are forked."""

    def __init__(self, places: int) -> None:
        """Make so many places, with nothing in them."""
        self._memory = mmap.mmap(-1, places * PLACE_BYTES)
        self._places = [Slot(self._memory, number * PLACE_BYTES) for number in range(places)]

    def seat(self, number: int) -> WorkerSlot:
        """Return the seat of one worker."""
        return WorkerSlot(self._places, number)


class WorkerSlot:
    """The board as one worker sees it: its own place, and all of them."""

    def __init__(self, places: list[Slot], number: int) -> None:
        self.own = places[number]
        self.places = places


class Slot:
    """What one worker shows."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        """Show nothing yet that is not there already."""
        self._memory = memory
        self._offset = offset
        # An item of a memoryview is written in one piece; `struct` writes zeros first, which a reader may see, and a
        # worker that is killed would leave.
        self._number = memoryview(memory)[offset : offset + 8].cast("Q")

    def write(self, text: bytes) -> None:
        """Show `text` in place of what was shown; only the worker of this place may.

        Raises:
            ValueError: it is too long.
        """
        if len(text) > _HALF_BYTES - _HEAD.size:
            raise ValueError(f"{len(text)} bytes are too many for a place of the board")
        number = self._number[0] + 1
        start = self._start(number)
        self._memory[start : start + _HEAD.size + len(text)] = _HEAD.pack(len(text), zlib.crc32(text)) + text
        self._number[0] = number

    def read(self) -> bytes | None:
        """Return what is shown; None when nothing is."""
        for _ in range(_TRIES):
            number = self._number[0]
            if number == 0:
                return None
            start = self._start(number)
            length, checksum = _HEAD.unpack_from(self._memory, start)
            text = self._memory[start + _HEAD.size : start + _HEAD.size + min(length, _HALF_BYTES)]
            if zlib.crc32(text) == checksum:
                return text
        return None  # written faster than it is read, which no worker does

    def _start(self, number: int) -> int:
        return self._offset + 64 + (number % 2) * _HALF_BYTES
