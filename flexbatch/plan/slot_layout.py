"""How many slots the KV cache has, and how wide they are.

A cache is planned for the job's longest rows. Where the rows at hand are shorter, the same memory is cut into more
slots, and into fewer again when longer ones come. The engine decides by the functions here, and the plan foresees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flexbatch.plan.workload import Workload, column_slack, span

# Times the slots that were planned: what else a row takes, a line of each activation, is planned for so many at most.
MOST_TIMES = 4

# Times as many slots as now, for which the cache is copied.
GAIN = 1.125


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """So many slots, for rows of up to `span` tokens, prompt and completion."""

    slots: int
    span: int

    @property
    def columns(self) -> int:
        """Of each slot: with room between two shifts."""
        return self.span + column_slack(self.span)


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """The memory of the layout that was planned, which may be cut into `most` slots."""

    planned: SlotLayout
    most: int

    def layout(self, longest: int) -> SlotLayout:
        """For rows of up to so many tokens."""
        narrow = SlotLayout(1, min(max(1, longest), self.planned.span))
        return SlotLayout(min(self.most, self.planned.slots * self.planned.columns // narrow.columns), narrow.span)


def next_layout(memory: SlotMemory, now: SlotLayout, *, in_flight: Sequence[int], waiting: Sequence[int]) -> SlotLayout:
    """The layout for the next pass: the one that is, or another if that has more slots by `GAIN`, or the first row in
    the line needs more columns and those in flight have room in it. `in_flight` and `waiting` are the most tokens that
    each row may get."""
    wanted = memory.layout(max([*in_flight, *waiting], default=now.span))
    if waiting and waiting[0] > now.span:
        return wanted if len(in_flight) <= wanted.slots else now
    return wanted if wanted.slots >= GAIN * now.slots else now


@lru_cache(maxsize=1024)
def usual_slots(workload: Workload, slots: int) -> int:
    """How many rows are in flight where `slots` were planned and layouts may change, on the average over the job.

    A row's layout is that of the longest one in flight with it, which are those that entered before it."""
    needs = _needs(workload)
    memory = SlotMemory(SlotLayout(slots, span(workload)), MOST_TIMES * slots)
    if memory.layout(max(needs)).slots == memory.layout(min(needs)).slots == slots:
        return slots
    before = min(len(needs), max(1, slots // workload.every))
    padded = np.concatenate([np.full(before, needs[0]), needs])
    longest = np.lib.stride_tricks.sliding_window_view(padded, before + 1).max(axis=1)
    # A row takes a slot for as many passes as any other, so it is the slots' shares of the memory that add up.
    shares = [1.0 / memory.layout(int(each)).slots for each in longest]
    usual = len(shares) / sum(shares) / ((1.0 + GAIN) / 2)
    return max(slots, min(workload.rows, int(usual)))


@lru_cache(maxsize=1024)
def most_slots(workload: Workload, slots: int) -> int:
    """The most rows that are in flight then."""
    memory = SlotMemory(SlotLayout(slots, span(workload)), min(MOST_TIMES * slots, max(slots, workload.rows)))
    return memory.layout(min(_needs(workload))).slots


def _needs(workload: Workload) -> list[int]:
    """Columns of each sampled row, in the job's order."""
    new = workload.new_lengths
    return [
        max(1, length - int(workload.shared_tokens)) + new[index % len(new)]
        for index, length in enumerate(workload.prompt_lengths)
    ]
