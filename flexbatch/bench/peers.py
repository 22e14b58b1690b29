"""Each peer at its best batch size, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexbatch.bench.trial import Outcome


@dataclass(frozen=True)
class Search:
    """All that was tried, in order. `best` is the fastest one that worked, or None."""

    tried: tuple[Outcome, ...]

    @property
    def best(self) -> Outcome | None:
        return max((outcome for outcome in self.tried if not outcome.error), key=lambda each: each.rate, default=None)

    @property
    def error(self) -> str:
        """Why nothing worked."""
        return self.tried[0].error if self.tried and self.best is None else ""


def search_batch(sizes: Sequence[int], attempt: Callable[[int], Outcome]) -> Search:
    """Tries the batch sizes from the smallest up, one batch each, until one is slower than the one before or fails."""
    tried: list[Outcome] = []
    for size in sorted(set(sizes)):
        outcome = attempt(size)
        tried.append(outcome)
        if outcome.error or (len(tried) > 1 and outcome.rate < tried[-2].rate):
            break
    return Search(tuple(tried))
