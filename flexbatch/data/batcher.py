"""The job's fixed order, and the fixed runs of it that become parts. Pure functions.

Order is what makes a run resumable: a prompt is known by its index in it, in the journal and between attempts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flexbatch.records import Prompt


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt with its place: `index` in the job's order, `part` number, `offset` inside the part."""

    index: int
    part: int
    offset: int
    prompt: Prompt


def longest_first(prompt: Prompt) -> Any:
    """The key of the order inside a window.

    By length, so that prompts prefilled together are padded little; the longest first, so that a window ends with
    short ones. Prompts of one length keep their input order (the sort is stable), which leaves the completions of one
    row and the rows of one few-shot set beside each other.
    """
    return -len(prompt.token_ids)


def job_order(prompts: Iterable[Prompt], window: int, key: Callable[[Prompt], Any] = longest_first) -> Iterator[Prompt]:
    """The prompts, sorted by `key` inside windows of `window` prompts; the windows stay in input order.

    Depends on the input and `window` alone. Holds one window in memory.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    source = iter(prompts)
    while block := list(itertools.islice(source, window)):
        yield from sorted(block, key=key)


def split_parts(order: Iterable[Prompt], part_rows: int) -> Iterator[Placed]:
    """Give every prompt of the order its index, its part and its offset in that."""
    if part_rows < 1:
        raise ValueError(f"part_rows is {part_rows}; it must be at least 1")
    for index, prompt in enumerate(order):
        part, offset = divmod(index, part_rows)
        yield Placed(index, part, offset, prompt)
