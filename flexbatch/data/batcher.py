"""The job's fixed order, and the fixed runs of it that become parts. Pure functions.

Order is what makes a run resumable: a prompt is known by its index in it, in the journal and between attempts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexbatch.data.prefix_groups import group_window
from flexbatch.records import Prompt


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt with its place: `index` in the job's order, `part` number, `offset` inside the part."""

    index: int
    part: int
    offset: int
    prompt: Prompt


def job_order(prompts: Iterable[Prompt], window: int) -> Iterator[Prompt]:
    """The prompts in their groups and by length inside windows of `window` prompts; windows stay in input order.

    Depends on the input and `window` alone. Holds one window in memory.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    source = iter(prompts)
    while block := list(itertools.islice(source, window)):
        yield from group_window(block)


def split_parts(order: Iterable[Prompt], part_rows: int) -> Iterator[Placed]:
    """Give every prompt of the order its index, its part and its offset in that."""
    if part_rows < 1:
        raise ValueError(f"part_rows is {part_rows}; it must be at least 1")
    for index, prompt in enumerate(order):
        part, offset = divmod(index, part_rows)
        yield Placed(index, part, offset, prompt)
