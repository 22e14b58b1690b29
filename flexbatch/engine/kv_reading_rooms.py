"""Memory for blocks of a KV cache that come from disk, in rooms that are filled and emptied in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexbatch.memory.direct_io import AlignedBuffer


@dataclass(frozen=True, eq=False)
class Room:
    """One of the rooms, and its memory: twice the same, uint8."""

    number: int
    tensor: torch.Tensor
    bytes: memoryview


class ReadingRooms:
    """`count` rooms of `size` bytes beside each other in `memory`. What is read one after the other lies so as far as
    that is possible, and can be looked at as one."""

    def __init__(self, memory: AlignedBuffer, size: int, count: int) -> None:
        self.size = size
        self._memory = memory
        self._free = [
            Room(number, memory.tensor[number * size :][:size], memory.bytes[number * size : (number + 1) * size])
            for number in range(count)
        ]
        self._count, self._last = count, count - 1

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    @property
    def at_most_together(self) -> int:
        """How many are looked at as one, so that others are filled meanwhile."""
        return max(1, (self._count - 1) // 2)

    def take(self) -> Room:
        """A free one, behind the last one if possible."""
        room = min(self._free, key=lambda each: (each.number - self._last - 1) % self._count)
        self._free.remove(room)
        self._last = room.number
        return room

    def give_back(self, room: Room) -> None:
        if room.number == self._last:
            self._last -= 1
        self._free.append(room)

    def together(self, rooms: Sequence[Room]) -> torch.Tensor:
        """The memory of rooms that follow one another."""
        return self._memory.tensor[rooms[0].number * self.size : (rooms[-1].number + 1) * self.size]
