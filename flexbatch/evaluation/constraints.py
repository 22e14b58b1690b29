"""Decoding constraints: which tokens may come next so that a completion parses, validates and ends in time.

Grammars are compiled by llguidance; a state holds its matcher for one row. llguidance alone guarantees a valid
beginning; a completion that runs into `max_new_tokens` would still be cut. So a state always knows a way to a valid
end, and a token after which that way would be longer than what is left is not said.
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


@dataclass(frozen=True)
class Constraint:
    """A compiled target. `vocabulary_size` is the number of logits, which can exceed the tokenizer's.

    `end_token` is said after a valid end. `way_out` are tokens from the start to a near valid end, found by
    saying the first of `closers` that the grammar takes, again and again.
    """

    matcher: llguidance.LLMatcher
    vocabulary: llguidance.LLTokenizer
    vocabulary_size: int
    max_new_tokens: int
    end_token: int
    closers: tuple[int, ...]
    way_out: tuple[int, ...]

    def shortest_end(self, matcher: llguidance.LLMatcher) -> tuple[int, ...]:
        return shortest_end(matcher, self.vocabulary, self.closers)

    def start(self) -> ConstraintState:
        return ConstraintState(self)


class ConstraintState:
    """Where one row stands. Its way out, tokens that bring it to a valid end, is never longer than what is left."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._matcher = constraint.matcher.deep_copy()
        self._left = constraint.max_new_tokens
        self._way_out = constraint.way_out
        self._ahead: dict[int, tuple[int, ...] | None] = {}  # ways out after tokens that were looked at here

    @property
    def closing_token(self) -> int:
        """The next token on the way out; an end-of-sequence token once all is said."""
        return self._way_out[0] if self._way_out else self._constraint.end_token

    def allowed(self) -> torch.Tensor:
        """bool `[vocabulary_size]`: the tokens that fit the grammar; an end-of-sequence token once all is said."""
        return torch.from_numpy(_mask(self._matcher, self._constraint.vocabulary_size))

    def leaves_room(self, token: int) -> bool:
        """Whether a valid end can still be reached within `max_new_tokens` once this allowed token is said."""
        way_out = self._way_out_after(token)
        return way_out is not None and len(way_out) < self._left

    def advance(self, token: int) -> None:
        """EngineError for a token that was not allowed."""
        way_out = self._way_out_after(token)
        if way_out is None or not self._matcher.consume_token(token):
            raise EngineError(
                f"token {token} does not fit the constraint: {self._matcher.get_error()}",
                remedy="This is a bug in flexbatch, or the journal belongs to another constraint.",
            )
        self._left, self._way_out, self._ahead = self._left - 1, way_out, {}

    def _way_out_after(self, token: int) -> tuple[int, ...] | None:
        """None for a token that is not allowed. A function of the tokens said so far alone, so that a resumed row
        goes the same way."""
        if self._way_out and self._way_out[0] == token:
            return self._way_out[1:]
        if token not in self._ahead:
            probe = self._matcher.deep_copy()
            taken = probe.consume_token(token)
            self._ahead[token] = self._constraint.shortest_end(probe) if taken else None
        return self._ahead[token]


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
    way_out = shortest_end(matcher, vocabulary, closers)
    if len(way_out) > max_new_tokens:
        raise ConfigError(
            f"generation.max_new_tokens is {max_new_tokens}, and the shortest valid output has about {len(way_out)} "
            "tokens",
            remedy=f"Set generation.max_new_tokens to {2 * len(way_out)} or more.",
        )
    return Constraint(matcher, vocabulary, vocabulary_size, max_new_tokens, min(end_tokens), closers, way_out)


def shortest_end(
    matcher: llguidance.LLMatcher, vocabulary: llguidance.LLTokenizer, closers: Sequence[int]
) -> tuple[int, ...]:
    """Tokens that bring the matcher to a valid end: a short way, found greedily, not always the shortest."""
    probe = matcher.deep_copy()
    way: list[int] = []
    while not (probe.is_accepting() or probe.is_stopped()) and len(way) < LONGEST_END:
        forced = probe.compute_ff_bytes()
        tokens = vocabulary.tokenize_bytes(forced) if forced else [_closing_token(probe, vocabulary, closers)]
        if not tokens or not probe.consume_tokens(tokens):
            raise EngineError(
                f"the constraint cannot be brought to an end: {probe.get_error() or 'no token fits'}",
                remedy="Simplify the schema or the expression, or set job.constrain=false.",
            )
        way += tokens
    return tuple(way)


def _closing_token(matcher: llguidance.LLMatcher, vocabulary: llguidance.LLTokenizer, closers: Sequence[int]) -> int:
    mask = _mask(matcher, vocabulary.vocab_size)
    for token in closers:
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
