"""Ranges of a file that are not in use: taken at the first place with room, and joined with their neighbours when given back."""

from __future__ import annotations

import bisect


class FreeRanges:
    """The free part of `0 .. size`."""

    def __init__(self, size: int) -> None:
        self._ranges: list[tuple[int, int]] = [(0, size)]  # offset and size, sorted; no two touch

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes that are in use from now on; None: there is no such range."""
        for index, (offset, room) in enumerate(self._ranges):
            if room >= size:
                if room == size:
                    del self._ranges[index]
                else:
                    self._ranges[index] = (offset + size, room - size)
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Makes a range free that was taken."""
        index = bisect.bisect_left(self._ranges, (offset, 0))
        if index < len(self._ranges) and self._ranges[index][0] == offset + size:
            size += self._ranges.pop(index)[1]
        if index and sum(self._ranges[index - 1]) == offset:
            index -= 1
            before = self._ranges.pop(index)
            offset, size = before[0], before[1] + size
        self._ranges.insert(index, (offset, size))
