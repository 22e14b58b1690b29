"""Prompts made to fit: shots are dropped from the end, then the text is cut at its right end, as HELM does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from flexbatch.evaluation.adapter import Draft

BATCH = 128  # prompts tokenized in one call


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that an evaluation uses."""

    all_special_ids: list[int]

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]:
        """`input_ids`: one list of token ids for each text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a prompt, in tokens.

    `prompt_tokens` is the job's longest prompt, special tokens included; a scenario with its own `prompt_tokens`
    replaces it. `context_tokens` is the model's number of positions; 0 where it has no bound.
    """

    prompt_tokens: int = 512
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt as the model gets it. `shots` are those kept; `dropped_tokens` were cut off the right end."""

    text: str
    token_ids: tuple[int, ...]
    shots: int
    truncated: bool = False
    dropped_tokens: int = 0


def encode(tokenizer: Tokenizer, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
    ids = tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]
    return [list(map(int, row)) for row in ids]


def fit_all(tokenizer: Tokenizer, drafts: Iterable[Draft], room: int, special_tokens: bool) -> Iterator[Fitted]:
    """`room` bounds the tokens of a prompt, special ones included."""
    remaining = iter(drafts)
    while batch := list(islice(remaining, BATCH)):
        encoded = encode(tokenizer, [draft.text for draft in batch], special_tokens)
        for draft, token_ids in zip(batch, encoded, strict=True):
            yield _fit(tokenizer, draft, token_ids, room, special_tokens)


def _fit(tokenizer: Tokenizer, draft: Draft, token_ids: list[int], room: int, special_tokens: bool) -> Fitted:
    while len(token_ids) > room and draft.shots:
        draft = draft.without_last_shot()
        token_ids = encode(tokenizer, [draft.text], special_tokens)[0]
    if len(token_ids) <= room:
        return Fitted(draft.text, tuple(token_ids), len(draft.shots))
    return _truncate(tokenizer, draft.text, len(token_ids), room, special_tokens)


def _truncate(tokenizer: Tokenizer, text: str, tokens: int, room: int, special_tokens: bool) -> Fitted:
    """Cut to `room` tokens and back to text; that text can have more tokens again, so characters follow one by one."""
    plain = encode(tokenizer, [text], special_tokens=False)[0]
    kept = plain[: max(0, room - (tokens - len(plain)))]
    shorter = tokenizer.decode(kept, skip_special_tokens=False)
    while True:
        token_ids = encode(tokenizer, [shorter], special_tokens)[0]
        if len(token_ids) <= room or not shorter:
            return Fitted(shorter, tuple(token_ids), 0, True, tokens - len(token_ids))
        shorter = shorter[:-1]


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    same = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        same += 1
    return same
