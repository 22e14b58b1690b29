"""Prefixes that groups of prompts share: computed once, kept once, given back with the last row that needs them.

What a row keeps of it depends on the model. Where attention goes through Transformers' attention interface, prefix
and own attention are merged by log-sum-exp (`attention.py`) and the arena holds own tokens only. Elsewhere the prefix's
keys and values are copied in front of each row's own, once, at its prefill: correct for any model, and its prefill is
saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from flexbatch.memory.tiers import TierBudget


@dataclass(eq=False)
class Prefix:
    """The keys and values of one shared prefix, `[1, heads, tokens, head_dim]` for each layer."""

    tokens: tuple[int, ...]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return sum(store.numel() * store.element_size() for store in (*self.keys, *self.values))

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next layer's."""
        self.keys.append(keys.contiguous())
        self.values.append(values.contiguous())


class PrefixStore:
    """The prefixes at hand, by their tokens."""

    def __init__(self, budget: TierBudget) -> None:
        self._budget = budget
        self._kept: dict[tuple[int, ...], Prefix] = {}
        self._admitted: dict[tuple[int, ...], int] = {}
        self._latest: tuple[int, ...] = ()

    def get(self, tokens: tuple[int, ...]) -> tuple[Prefix, bool]:
        """The prefix, and whether it is new: then it must be computed in this pass, before its rows."""
        self._latest = tokens
        known = self._kept.get(tokens)
        if known is not None:
            return known, False
        return self._kept.setdefault(tokens, Prefix(tokens)), True

    def admit(self, prefix: Prefix) -> None:
        """Counts a computed prefix against the device's budget."""
        self._admitted[prefix.tokens] = prefix.nbytes
        self._budget.reserve(prefix.nbytes, "shared prefixes")

    def keep_only(self, needed: Iterable[tuple[int, ...]]) -> None:
        """Gives back every prefix that is not among these tokens, but for the latest one asked for: groups come in
        order, so more of its rows may be on their way though none of them waits yet."""
        wanted = {*needed, self._latest}
        for tokens in [tokens for tokens in self._kept if tokens not in wanted]:
            del self._kept[tokens]
            if tokens in self._admitted:
                self._budget.release(self._admitted.pop(tokens), "shared prefixes")
