"""A row on its way: its tokens so far, and whether it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from flexbatch.engine.lookup import Draft
from flexbatch.engine.prefix import Prefix
from flexbatch.records import Completion, FinishReason, Request


class Decoder(Protocol):
    """The part of a Transformers tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True)
class Vocabulary:
    """What the engine must know of the tokenizer: how to decode, and which tokens end a sequence."""

    decoder: Decoder
    end_tokens: frozenset[int]


class ConstraintState(Protocol):
    """Where one row stands in its constraint (a JSON schema, a regular expression, a choice of strings)."""

    @property
    def closing_token(self) -> int:
        """The next token on a way to a valid end that fits into the row's new tokens."""
        ...

    def allowed(self) -> torch.Tensor:
        """bool `[vocabulary]`: the tokens that fit; an end-of-sequence token is one when all is said."""
        ...

    def leaves_room(self, token: int) -> bool:
        """Whether a valid end is still within reach after this allowed token."""
        ...

    def advance(self, token: int) -> None: ...


@dataclass
class GrowingRow:
    """A request in a slot. `tokens` includes what earlier attempts generated. `draft` is what may come next, `guesses`
    what the next pass is fed of it, and `lag` by how many columns the newest token is before the arena's end."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    constraint: ConstraintState | None = None
    kept_apart: Prefix | None = None
    draft: Draft = Draft()
    guesses: tuple[int, ...] = ()
    lag: int = 0

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Prompt and completion so far."""
        return self.request.prompt_ids + tuple(self.tokens)

    @property
    def fed_tokens(self) -> tuple[int, ...]:
        """What the prefill feeds to the model: everything, but for the last of tokens that are scored, which is only
        predicted. A prompt of one token more than the model has positions can so be scored."""
        return self.all_tokens[:-1] if self.request.score_tokens else self.all_tokens

    @property
    def shared_tokens(self) -> tuple[int, ...]:
        """The prefix that the request shares with others; empty if it shares none."""
        return self.request.prompt_ids[: self.request.shared_tokens]

    @property
    def arena_length(self) -> int:
        """Tokens whose keys and values are in the arena: all but the last one, which the next pass feeds, and but
        those of a prefix that is kept apart."""
        cached = len(self.request.prompt_ids) + len(self.tokens) - 1
        return cached - (len(self.kept_apart) if self.kept_apart else 0)

    def add(self, token: int, logprob: float | None) -> None:
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.constraint is not None:
            self.constraint.advance(token)


def finish(row: GrowingRow, vocabulary: Vocabulary) -> Completion | None:
    """The row's completion if its newest token ended it: end of sequence, a stop string, or the length."""
    sampling, decoder = row.request.sampling, vocabulary.decoder
    if row.tokens and row.tokens[-1] in vocabulary.end_tokens:
        return _completion(row, decoder.decode(row.tokens, skip_special_tokens=True), "stop")
    text = stopped_text(row.tokens, sampling.stop, decoder)
    if text is not None:
        return _completion(row, text, "stop")
    if len(row.tokens) >= sampling.max_new_tokens:
        return _completion(row, decoder.decode(row.tokens, skip_special_tokens=True), "length")
    return None


def stopped_text(tokens: list[int], stops: tuple[str, ...], decoder: Decoder) -> str | None:
    """The text before the first stop string, or None if there is none yet; a stop string may cross token borders.

    Called after every token, so only a tail that is long enough to hold the longest stop string is decoded first: a
    character takes up to four byte-level tokens, and a few more give the decoder its context.
    """
    if not stops or not tokens:
        return None
    tail = tokens[-(4 * max(len(stop) for stop in stops) + 8) :]
    tail_text = decoder.decode(tail, skip_special_tokens=True)
    if not any(stop in tail_text for stop in stops):
        return None
    text = decoder.decode(tokens, skip_special_tokens=True)
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def _completion(row: GrowingRow, text: str, reason: FinishReason) -> Completion:
    return Completion(row.request.index, tuple(row.tokens), text, reason, tuple(row.logprobs))
