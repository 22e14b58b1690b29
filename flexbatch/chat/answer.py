"""An answer on its way: from tokens to text that can be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a decoder gives for the first bytes of a character whose last ones are not there yet."""


class AnswerText:
    """The text of an answer as its tokens come. `stopped` turns true at the first stop string.

    Held back until it is clear: half a character, white space at the end, and what may become a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self._text, self._shown = "", 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it so far, without white space around it."""
        return self._text.strip()

    def add(self, tokens: Sequence[int]) -> str:
        """What can be shown now that these tokens have come."""
        self.tokens += tokens
        self._text = self._decoded(self.tokens)
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]
            return self._show(len(self._text))
        clear = len(self._text.rstrip(REPLACEMENT))
        return self._show(clear - max((beginning(self._text[:clear], stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        """What was held back at the end."""
        return self._show(len(self._text))

    def kept_tokens(self) -> tuple[int, str]:
        """How many of the tokens lie before the stop string, and the text of the answer that they leave out, because
        a token goes across."""
        if not self.stopped:
            return len(self.tokens), ""
        for count in range(len(self.tokens), -1, -1):
            before = self._decoded(self.tokens[:count])
            if self._text.startswith(before):
                return count, self._text[len(before) :].rstrip()
        return 0, self._text.rstrip()

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _show(self, end: int) -> str:
        """The text from what is shown already up to `end`, without white space on the outside."""
        start = self._shown or len(self._text) - len(self._text.lstrip())
        end = len(self._text[:end].rstrip())
        if end <= start:
            return ""
        self._shown = end
        return self._text[start:end]


def beginning(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
