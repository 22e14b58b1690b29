"""Decoding constraints: which tokens may come next so that a completion parses, validates and ends in time.

Grammars are compiled by llguidance; a state holds its matcher for one row. llguidance alone guarantees a valid
beginning; a completion that runs into `max_new_tokens` would still be cut. So a state watches how many tokens the
shortest way to a valid end takes, and when these are all that are left, it allows nothing but that way.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import llguidance
import llguidance.numpy
import numpy as np
import torch
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from flexbatch.errors import ConfigError, EngineError
from flexbatch.evaluation.fields import Target
from flexbatch.evaluation.grammar import check_grammar, grammar

# Bytes that lead to an end soonest: close what is open, go on only where that is required.
CLOSERS: Final = '"}],:0' + string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation + " "
LONGEST_END: Final = 4096  # tokens; a grammar whose shortest end is longer cannot be ended
SLACK: Final = 8  # tokens by which one token more can put the end further away


@dataclass(frozen=True)
class Constraint:
    """A compiled target. `vocabulary_size` is the number of logits, which can exceed the tokenizer's."""

    matcher: llguidance.LLMatcher
    vocabulary: llguidance.LLTokenizer
    vocabulary_size: int
    max_new_tokens: int
    closers: tuple[int, ...]

    def start(self) -> ConstraintState:
        return ConstraintState(self)


class ConstraintState:
    """Where one row stands."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._matcher = constraint.matcher.deep_copy()
        self._left = constraint.max_new_tokens
        self._look_at = self._left  # the way to the end is measured again when so many tokens are left
        self._way: list[int] | None = None

    def allowed(self) -> torch.Tensor:
        """bool `[vocabulary_size]`: the tokens that may come next; an end-of-sequence token once all is said."""
        if self._way is None and self._left <= self._look_at:
            way = shortest_end(self._matcher, self._constraint)
            spare = self._left - len(way) - SLACK
            if spare <= 0:
                self._way = way
            self._look_at = self._left - max(1, spare // 2)
        if self._way:
            only = torch.zeros(self._constraint.vocabulary_size, dtype=torch.bool)
            only[self._way[0]] = True
            return only
        return torch.from_numpy(_mask(self._matcher, self._constraint.vocabulary_size))

    def advance(self, token: int) -> None:
        """EngineError for a token that was not allowed."""
        if not self._matcher.consume_token(token):
            raise EngineError(
                f"token {token} does not fit the constraint: {self._matcher.get_error()}",
                remedy="This is a bug in flexbatch, or the journal belongs to another constraint.",
            )
        self._left -= 1
        if self._way and self._way.pop(0) != token:
            self._way = None
            self._look_at = self._left


def compile_constraint(
    target: Target,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocabulary_size: int,
    end_tokens: Sequence[int],
    max_new_tokens: int,
) -> Constraint:
    """Everything that can fail for all rows fails here. ConfigError also where no valid output is short enough."""
    check_grammar(target)
    vocabulary = from_tokenizer(tokenizer, n_vocab=vocabulary_size, eos_token=sorted(end_tokens))
    matcher = llguidance.LLMatcher(vocabulary, grammar(target), log_level=0)
    closers = tuple(dict.fromkeys(vocabulary.greedy_tokenize(character)[0] for character in CLOSERS))
    constraint = Constraint(matcher, vocabulary, vocabulary_size, max_new_tokens, closers)
    shortest = len(shortest_end(matcher, constraint))
    if shortest > max_new_tokens:
        raise ConfigError(
            f"generation.max_new_tokens is {max_new_tokens}, and the shortest valid output has about {shortest} tokens",
            remedy=f"Set generation.max_new_tokens to {2 * shortest} or more.",
        )
    return constraint


def shortest_end(matcher: llguidance.LLMatcher, constraint: Constraint) -> list[int]:
    """Tokens that bring the matcher to a valid end: a short way, found greedily, not always the shortest."""
    probe = matcher.deep_copy()
    way: list[int] = []
    while not probe.is_accepting() and len(way) < LONGEST_END:
        forced = probe.compute_ff_bytes()
        tokens = constraint.vocabulary.tokenize_bytes(forced) if forced else [_closing_token(probe, constraint)]
        if not tokens or not probe.consume_tokens(tokens):
            raise EngineError(
                f"the constraint cannot be brought to an end: {probe.get_error() or 'no token fits'}",
                remedy="Simplify the schema or the expression, or set job.constrain=false.",
            )
        way += tokens
    return way


def _closing_token(matcher: llguidance.LLMatcher, constraint: Constraint) -> int:
    mask = _mask(matcher, constraint.vocabulary_size)
    for token in constraint.closers:
        if mask[token]:
            return token
    return int(mask.argmax())


def _mask(matcher: llguidance.LLMatcher, vocabulary_size: int) -> Any:
    """bool `[vocabulary_size]`."""
    packed = llguidance.numpy.allocate_token_bitmask(1, vocabulary_size)
    llguidance.numpy.fill_next_token_bitmask(matcher, packed)
    if matcher.is_error():
        raise EngineError(f"the constraint failed: {matcher.get_error()}", remedy="Simplify the schema.")
    return np.unpackbits(packed.view(np.uint8), bitorder="little")[:vocabulary_size].astype(bool)
