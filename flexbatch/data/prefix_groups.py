"""Which prompts share how long a prefix: found from tokens alone, for few-shot jobs and any other dataset.

A group's prefix is computed once and kept once, so a group of n prompts with a prefix of v tokens saves (n - 1) * v
tokens of prefill. Every prompt belongs to at most one group. The grouping that saves most is found in the tree of
common prefixes (lcp-intervals, Abouelhoda et al. 2004): a node is either one group, or what is best for its children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flexbatch.records import Prompt

LEAST_TOKENS = 16  # shorter prefixes (a leading special token, two words) cost more to keep apart than they save
LEAST_SAVING = 64  # tokens that a group must save


@dataclass(slots=True)
class _Node:
    """Prompts `left` to `right` of the sorted order, which have `shared` tokens in common."""

    shared: int
    left: int
    right: int = 0
    children: list[_Node] = field(default_factory=list)
    saving: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # (left, right, shared tokens)

    def close(self, right: int) -> None:
        """Chooses between one group and the children's groups."""
        self.right = right
        below = sum(child.saving for child in self.children)
        alone = (right - self.left) * self.shared
        if self.shared >= LEAST_TOKENS and alone >= max(LEAST_SAVING, below):
            self.saving, self.groups = alone, [(self.left, right, self.shared)]
        else:
            self.saving, self.groups = below, [group for child in self.children for group in child.groups]
        self.children = []


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two prompts share."""
    if first[: len(second)] == second[: len(first)]:
        return min(len(first), len(second))
    low, high = 0, min(len(first), len(second))
    while low < high:  # the first place of difference, by bisection over slices compared at C speed
        middle = (low + high) // 2
        if first[low : middle + 1] == second[low : middle + 1]:
            low = middle + 1
        else:
            high = middle
    return low


def find_groups(prompts: Sequence[tuple[int, ...]], own_tokens: Sequence[int]) -> list[tuple[list[int], int]]:
    """Groups as (indices of the prompts, tokens of their prefix).

    `own_tokens[i]` is how many tokens at the end of prompt i must not belong to a prefix (at least 1: the logits of
    the last one start the completion).
    """
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    usable = [len(prompts[index]) - own_tokens[index] for index in order]
    shared = [
        max(0, min(common_length(prompts[order[place - 1]], prompts[order[place]]), usable[place - 1], usable[place]))
        for place in range(1, len(order))
    ]
    return [
        ([order[place] for place in range(left, right + 1)], tokens) for left, right, tokens in _best_groups(shared)
    ]


def _best_groups(shared: Sequence[int]) -> list[tuple[int, int, int]]:
    """`shared[i]` is what places i and i + 1 of the sorted order have in common."""
    stack = [_Node(0, 0)]
    for place, tokens in enumerate([*shared, 0], start=1):
        left, last = place - 1, None
        while stack[-1].shared > tokens:
            last = stack.pop()
            last.close(place - 1)
            left = last.left
            if stack[-1].shared >= tokens:
                stack[-1].children.append(last)
                last = None
        if stack[-1].shared < tokens:
            stack.append(_Node(tokens, left, children=[last] if last is not None else []))
    root = stack[0]
    root.close(len(shared))
    return root.groups


def group_window(window: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of one window in the job's order, each with the length of the prefix that it shares.

    Groups stay together, in the order of their first rows; then come the rows without a group. Inside both the longest
    comes first, so that prompts prefilled together are padded little. Rows of equal length keep their input order.
    """
    rank = [len(window)] * len(window)
    shared = [0] * len(window)
    owned = [1 + prompt.score_tokens for prompt in window]
    for members, tokens in find_groups([prompt.token_ids for prompt in window], owned):
        for index in members:
            rank[index], shared[index] = min(members), tokens
    order = sorted(range(len(window)), key=lambda index: (rank[index], -len(window[index].token_ids), index))
    return [replace(window[index], shared_tokens=shared[index]) for index in order]
