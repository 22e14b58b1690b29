"""What enters a pass besides the decode batch: micro-batches of whole prompts, and parts of a long one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.prefix import Prefix

Kind = Callable[[GrowingRow], bool]


@dataclass(frozen=True)
class Joining:
    """A prefill micro-batch: rows that go on growing (or end at once), or requests to score."""

    rows: list[GrowingRow]
    slots: list[int]
    scored: bool
    prefix: Prefix | None = None


@dataclass
class Entering:
    """A prompt that enters in parts: the tokens that its slot holds, and the sizes of the parts to come."""

    row: GrowingRow
    slot: int
    sizes: list[int]
    held: int = 0

    def next_part(self, end: int) -> Part:
        """The part for the pass whose newest column is `end`; the last part's last token will be in its pass's newest
        column, as every row's is."""
        size, tokens = self.sizes.pop(0), self.row.fed_tokens
        before, self.held = self.held, self.held + size
        behind = len(tokens) - self.held
        return Part(self, tokens[before : self.held], before, end + len(self.sizes) - behind)


@dataclass(frozen=True)
class Part:
    """`tokens` of the prompt `of`, after the `before` tokens that its slot holds, up to column `last`."""

    of: Entering
    tokens: tuple[int, ...]
    before: int
    last: int

    @property
    def completes(self) -> bool:
        return not self.of.sizes


def alike(
    rows: list[GrowingRow], shared: Callable[[GrowingRow], tuple[int, ...]]
) -> list[tuple[tuple[Kind, tuple[int, ...]], list[GrowingRow]]]:
    """The rows by what may share a micro-batch: the kind of request, and the prefix."""
    groups: dict[tuple[Kind, tuple[int, ...]], list[GrowingRow]] = {}
    for row in rows:
        kind = next(kind for kind in (is_scored, ends_at_prefill, keeps_growing) if kind(row))
        groups.setdefault((kind, shared(row)), []).append(row)
    return list(groups.items())


def is_scored(row: GrowingRow) -> bool:
    return row.request.score_tokens > 0


def ends_at_prefill(row: GrowingRow) -> bool:
    return not is_scored(row) and row.request.sampling.max_new_tokens - len(row.tokens) <= 1


def keeps_growing(row: GrowingRow) -> bool:
    return not is_scored(row) and not ends_at_prefill(row)
