"""The simplest tokenizer: a token is a word with the space before it. As many tokens as in `golden/record_helm.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SpaceTokenizer:
    """With `special`, a first token is put before every text, as OPT's tokenizer does."""

    def __init__(self, special: bool = False) -> None:
        self.pieces = ["</s>"]
        self.special = special
        self.all_special_ids = [0]
        self._ids: dict[str, int] = {}

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        start = [0] if self.special and add_special_tokens else []
        return {"input_ids": [[*start, *map(self._id, _pieces(item))] for item in text]}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.pieces[token] for token in token_ids if token or not skip_special_tokens)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self.pieces)
            self.pieces.append(piece)
        return self._ids[piece]


def _pieces(text: str) -> list[str]:
    first, *others = text.split(" ")
    return [first, *(f" {word}" for word in others)]
