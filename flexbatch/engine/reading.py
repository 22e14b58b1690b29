"""What is read of logits before they are given back: the next tokens of rows, or the scores of given ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from flexbatch.engine.growing import ConstraintState, GrowingRow, Vocabulary, finish
from flexbatch.engine.sampling import choose, log_probabilities
from flexbatch.records import Completion, Request

CHOICES = 8  # tokens of a constrained row that are tried before its way to the end is taken

Chosen = tuple[int, float]
"""A token and the natural logarithm of its probability (0 where nobody asked for it)."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How many tokens a row has gained in a pass, and its completion if it is done."""

    row: GrowingRow
    tokens: int
    completion: Completion | None


def grow(
    rows: Sequence[GrowingRow | None], vocabulary: Vocabulary, logits: torch.Tensor, part: slice, _positions: slice
) -> list[Gain]:
    """Those of `rows` that are in `part` and there get their next tokens, from its logits, float32 `[part, places,
    vocabulary]`, which may be changed: one token each, and another for each of its guesses that turns out right."""
    asking = [(index, row) for index, row in enumerate(rows[part]) if row is not None]
    gains: dict[int, Gain] = {}
    for place in range(logits.shape[1]):
        if not asking:
            break
        own = logits[:, place] if len(asking) == len(logits) else logits[[index for index, _ in asking], place]
        chosen = choose_tokens([row for _, row in asking], vocabulary.end_tokens, own)
        right = []
        for (index, row), (token, logprob) in zip(asking, chosen, strict=True):
            row.add(token, logprob if row.request.sampling.logprobs else None)
            done = finish(row, vocabulary)
            gains[index] = Gain(row, place + 1, done)
            if done is None and row.guesses[place : place + 1] == (token,):
                right.append((index, row))
        asking = right
    return [gains[index] for index in sorted(gains)]


def choose_tokens(rows: Sequence[GrowingRow], end_tokens: Collection[int], own: torch.Tensor) -> list[Chosen]:
    """The next token of each row from its logits, float32 `[rows, vocabulary]`, which may be changed."""
    samplings = [row.request.sampling for row in rows]
    wanted = any(sampling.logprobs for sampling in samplings)
    allowed = own.clone() if wanted else own  # probabilities are those of the model, whatever is allowed
    for index, row in enumerate(rows):
        forbid(allowed[index], row, end_tokens)
    tokens = choose(allowed, samplings, [len(row.tokens) for row in rows])
    for index, row in enumerate(rows):
        if row.constraint is not None:
            tokens[index] = _with_room_to_end(row, row.constraint, allowed[index], int(tokens[index]))
    logprobs = log_probabilities(own, tokens).tolist() if wanted else [0.0] * len(rows)
    return list(zip(tokens.tolist(), logprobs, strict=True))


def _with_room_to_end(row: GrowingRow, constraint: ConstraintState, logits: torch.Tensor, token: int) -> int:
    """`token`, or the next choice from `logits` `[vocabulary]`, which are changed, that leaves room for a valid end."""
    for _ in range(CHOICES):
        if constraint.leaves_room(token):
            return token
        logits[token] = -torch.inf
        token = int(choose(logits[None], [row.request.sampling], [len(row.tokens)])[0])
    return constraint.closing_token


def forbid(logits: torch.Tensor, row: GrowingRow, end_tokens: Collection[int]) -> None:
    """Makes tokens that may not come next (minimum length, constraint) impossible in `logits` `[vocabulary]`."""
    vocabulary_size = len(logits)
    if row.constraint is not None:
        allowed = row.constraint.allowed()[:vocabulary_size].to(logits.device)
        logits[: len(allowed)].masked_fill_(~allowed, -torch.inf)
        logits[len(allowed) :] = -torch.inf
    if len(row.tokens) < row.request.sampling.min_new_tokens:
        for token in end_tokens:
            if token < vocabulary_size:
                logits[token] = -torch.inf


Score = tuple[list[float], bool]
"""Log-probabilities of some of a request's scored tokens, and whether greedy decoding would have said them."""


def score_slice(
    requests: Sequence[Request], kept: int, logits: torch.Tensor, rows: slice, positions: slice
) -> list[tuple[int, Score]]:
    """The scored tokens that these logits, float32 `[rows, positions, vocabulary]`, predict, with their row's number.
    The last of the `kept` positions predicts a request's last token."""
    made = []
    for index, request in enumerate(requests[rows]):
        first = max(positions.start, kept - request.score_tokens)
        if first >= positions.stop:
            continue
        # Position k predicts the token that stands `kept` - k from the prompt's end.
        end = len(request.prompt_ids) - kept
        wanted = request.prompt_ids[end + first : end + positions.stop]
        targets = torch.tensor(wanted, device=logits.device)
        before = logits[index, first - positions.start :]
        greedy = bool((before.argmax(-1) == targets).all())
        made.append((rows.start + index, (log_probabilities(before, targets).tolist(), greedy)))
    return made


def scored(request: Request, scores: list[Score]) -> Completion:
    """A scored request's completion from its slices."""
    logprobs = tuple(logprob for part, _ in scores for logprob in part)
    greedy = all(greedy for _, greedy in scores)
    return Completion(request.index, request.prompt_ids[-request.score_tokens :], "", "stop", logprobs, greedy)
