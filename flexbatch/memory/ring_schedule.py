"""Which unit is where in the stream's ring: opened ahead of use, handed out, given back. Bookkeeping without threads.

The caller holds the stream's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from flexbatch.errors import EngineError
from flexbatch.memory.stream_layout import Job, PlacedUnit, Region, placements


class LeaseState(Enum):
    FILLING = "on its way into the ring, or there"
    HELD = "handed out"
    RELEASED = "given back, behind one that is not"


@dataclass
class Lease:
    """One turn of a unit. `events` are the couriers' last ones, `released` the reader's (CUDA only)."""

    placed: PlacedUnit
    name: str
    opened: int = 0
    jobs_left: int = 0
    state: LeaseState = LeaseState.FILLING
    events: dict[int, torch.cuda.Event] = field(default_factory=dict)
    released: torch.cuda.Event | None = None

    @property
    def open(self) -> bool:
        """Some of its regions have no place yet."""
        return self.opened < len(self.placed.regions)

    @property
    def whole(self) -> bool:
        return not self.open and self.jobs_left == 0


@dataclass(frozen=True, slots=True)
class Task:
    """A job with its place in the ring, and the events of readers of what was there before."""

    lease: Lease
    job: Job
    place: int
    after: tuple[torch.cuda.Event, ...]


class RingSchedule:
    """The leases of a ring of `ring_bytes`, for units in cyclic order."""

    def __init__(self, names: Sequence[str], regions: Sequence[Sequence[Region]], ring_bytes: int) -> None:
        self._names = tuple(names)
        self._ring_bytes = ring_bytes
        self._placements = placements(regions, ring_bytes)
        self._leases: deque[Lease] = deque()  # in the order of use, until given back
        self._freed: deque[tuple[int, int, torch.cuda.Event]] = deque()  # extents that queued work may still read

    def open_region(self) -> tuple[Task, ...]:
        """The tasks of the next region whose place is free; none when nothing is free."""
        while self.can_open():
            lease = self._leases[-1]
            region, position = lease.placed.regions[lease.opened], lease.placed.positions[lease.opened]
            lease.opened += 1
            lease.jobs_left += len(region.jobs)
            after = self._readers_between(position - self._ring_bytes, position - self._ring_bytes + region.nbytes)
            base = position % self._ring_bytes
            if region.jobs:
                return tuple(Task(lease, job, base + job.at, after) for job in region.jobs)
        return ()

    def can_open(self) -> bool:
        """Whether the next region's place is free: what was there a ring's length before has been given back."""
        self._look_ahead()
        if not self._leases or not self._leases[-1].open:
            return False
        lease = self._leases[-1]
        end = lease.placed.positions[lease.opened] + lease.placed.regions[lease.opened].nbytes
        return end <= self._leases[0].placed.start + self._ring_bytes

    def next_lease(self) -> Lease | None:
        """The lease that is handed out next."""
        self._look_ahead()
        return next((lease for lease in self._leases if lease.state is LeaseState.FILLING), None)

    def held(self) -> list[str]:
        return [lease.name for lease in self._leases if lease.state is LeaseState.HELD]

    def release(self, name: str, event: torch.cuda.Event | None) -> None:
        """Gives back the oldest held turn of `name`; its memory is free once all older turns are back as well."""
        lease = next((each for each in self._leases if each.state is LeaseState.HELD and each.name == name), None)
        if lease is None:
            raise EngineError(f"The unit {name!r} of the weight stream is released without being held.")
        lease.state, lease.released = LeaseState.RELEASED, event
        while self._leases and self._leases[0].state is LeaseState.RELEASED:
            gone = self._leases.popleft()
            if gone.released is not None:
                self._freed.append((gone.placed.start, gone.placed.end, gone.released))

    def _look_ahead(self) -> None:
        """Keeps a lease that has regions left at the end of the queue; at most one pass ahead."""
        while self._names and len(self._leases) <= len(self._names) and not (self._leases and self._leases[-1].open):
            placed = next(self._placements)
            self._leases.append(Lease(placed, self._names[placed.index]))

    def _readers_between(self, start: int, end: int) -> tuple[torch.cuda.Event, ...]:
        while self._freed and self._freed[0][1] <= start:
            self._freed.popleft()
        return tuple(event for first, last, event in self._freed if first < end and last > start)
