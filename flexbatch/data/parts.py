"""Collects completions, which arrive in any order, into parts, which are fixed runs of the job's order."""

from __future__ import annotations

from collections.abc import Iterator

from flexbatch.data.batcher import Placed
from flexbatch.records import Completion, Part, Prompt


class PartAssembler:
    """Give it every prompt with `expect` and every completion with `complete`; it hands out parts as they fill.

    The last part may be short: it is handed out once `close` has said that no more prompts will come.
    """

    def __init__(self, part_rows: int) -> None:
        self._part_rows = part_rows
        self._expected: dict[int, dict[int, Prompt]] = {}
        self._completed: dict[int, dict[int, Completion]] = {}
        self._closed = False

    def expect(self, placed: Placed) -> None:
        self._expected.setdefault(placed.part, {})[placed.index] = placed.prompt

    def complete(self, completion: Completion) -> Part | None:
        """The part that this completion fills, if it fills one.

        Raises:
            KeyError: the completion's index was never expected, or is complete already.
        """
        number = completion.index // self._part_rows
        done = self._completed.setdefault(number, {})
        if completion.index not in self._expected[number] or completion.index in done:
            raise KeyError(completion.index)
        done[completion.index] = completion
        return self._take(number) if self._is_full(number) else None

    def close(self) -> Iterator[Part]:
        """No more prompts will come: the parts that are full because of that (at most the last one)."""
        self._closed = True
        for number in sorted(self._expected):
            if self._is_full(number):
                yield self._take(number)

    @property
    def open_parts(self) -> tuple[int, ...]:
        """Numbers of the parts that wait for completions."""
        return tuple(sorted(self._expected))

    def _is_full(self, number: int) -> bool:
        expected = len(self._expected[number])
        whole = expected == self._part_rows or self._closed
        return whole and len(self._completed.get(number, ())) == expected

    def _take(self, number: int) -> Part:
        prompts, done = self._expected.pop(number), self._completed.pop(number)
        rows = tuple((prompts[index], done[index]) for index in sorted(prompts))
        return Part(number=number, first=min(prompts), rows=rows)
