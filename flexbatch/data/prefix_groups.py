"""Which prompts share how long a prefix: found from tokens alone, for few-shot jobs and any other dataset.

A group's prefix is computed once and kept once, so a group of n prompts with a prefix of v tokens saves (n - 1) * v
tokens of prefill. Every prompt belongs to at most one group. Groups are chosen in the tree of common prefixes
(lcp-intervals, Abouelhoda et al. 2004), from the longest prefixes to the shortest: a branch keeps the groups found in
it or joins the group around it, whichever saves more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from flexbatch.records import Prompt

LEAST_TOKENS = 16  # shorter prefixes (a leading special token, two words) cost more to keep apart than they save
LEAST_SAVING = 64  # tokens that a group must save


_Group = tuple[list[int], int]
"""Places of the sorted order, and the tokens that the prompts there share."""


@dataclass(slots=True)
class _Node:
    """Prompts at places `left` to `right` of the sorted order, which have `shared` tokens in common.

    `loose` are its places that are in none of the `groups` found below it.
    """

    shared: int
    left: int
    right: int = 0
    children: list[_Node] = field(default_factory=list)
    saving: int = 0
    loose: list[int] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)

    def close(self, right: int) -> None:
        """Chooses between the children's groups alone, and a group of its own: of all prompts, or of all but those of
        children that save more by themselves than they would in it."""
        self.right = right
        self.saving, self.groups = sum(child.saving for child in self.children), _groups(self.children)
        self.loose = self._loose_beside(self.children)
        for kept in ([], [child for child in self.children if child.gain_apart(self.shared) > 0]):
            loose = self._loose_beside(kept)
            own = (len(loose) - 1) * self.shared
            saving = own + sum(child.saving for child in kept)
            if self.shared >= LEAST_TOKENS and own >= LEAST_SAVING and saving >= self.saving:
                self.saving, self.loose, self.groups = saving, [], [(loose, self.shared), *_groups(kept)]
        self.children = []

    def gain_apart(self, shared: int) -> int:
        """What its groups save beyond a place of all its prompts in a group around it of `shared` tokens."""
        return self.saving - (self.right - self.left + 1 - len(self.loose)) * shared

    def _loose_beside(self, kept: Sequence[_Node]) -> list[int]:
        """The places that are in no group if the children `kept` keep theirs and the others give theirs up."""
        places, place = [], self.left
        for child in kept:
            places += [*range(place, child.left), *child.loose]
            place = child.right + 1
        return [*places, *range(place, self.right + 1)]


def _groups(nodes: Iterable[_Node]) -> list[_Group]:
    return [group for node in nodes for group in node.groups]


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
    return [([order[place] for place in places], tokens) for places, tokens in _best_groups(shared)]


def _best_groups(shared: Sequence[int]) -> list[_Group]:
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
