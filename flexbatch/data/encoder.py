"""From prompt texts to token ids of at most `max_tokens`, many at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexbatch.config import PromptConfig
from flexbatch.data.columns import is_encodable
from flexbatch.errors import ConfigError, PromptError

PROBE = "a"


class Tokenizer(Protocol):
    """What is used of a Transformers fast tokenizer."""

    chat_template: Any

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids; how many were cut off; or why there are none."""

    token_ids: tuple[int, ...] = ()
    dropped_tokens: int = 0
    error: str = ""


class Encoder:
    """Tokenizes in batches and truncates.

    Truncation cuts the text's own tokens, on the left or right, and keeps the special tokens that the tokenizer puts
    before and after every text (such as OPT's leading `</s>`): a model that was trained with them needs them. A chat
    prompt already has its special tokens as text; truncation on the left then costs it its opening.

    Raises:
        ConfigError: prompt.max_tokens leaves no room beside the special tokens.
        PromptError: prompt.chat_template is asked of a tokenizer that has none.
    """

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._special = config.special_tokens and not config.chat_template
        self._before, self._after = _surrounding(tokenizer) if self._special else ((), ())
        self._room = config.max_tokens - len(self._before) - len(self._after)
        if self._room < 1:
            raise ConfigError(
                f"prompt.max_tokens is {config.max_tokens}; the tokenizer's special tokens alone take "
                f"{config.max_tokens - self._room}.",
                remedy="Raise prompt.max_tokens, or set prompt.special_tokens=false.",
            )
        if config.chat_template:
            self._check_chat()

    def _check_chat(self) -> None:
        if not self._tokenizer.chat_template:
            raise PromptError(
                "prompt.chat_template is set, but the model's tokenizer has no chat template.",
                remedy="Set prompt.chat_template=false, or use a model that was trained for chat.",
            )
        try:
            self.chat(PROBE)
        except Exception as error:  # the template is the model author's program
            raise PromptError(
                f"prompt.chat_template: the tokenizer's chat template fails: {error}",
                remedy="Leave prompt.system empty if the model has no system message; or prompt.chat_template=false.",
            ) from error

    @property
    def chat_template(self) -> Any:
        return self._tokenizer.chat_template

    def chat(self, text: str) -> str:
        """The text as the user's message, in the form of the model's conversations, up to the model's turn."""
        messages = [{"role": "system", "content": self._config.system}] if self._config.system else []
        messages.append({"role": "user", "content": text})
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """One `Encoded` for each text, in order."""
        usable = [text if is_encodable(text) else "" for text in texts]
        if not usable:
            return []
        rows = _token_ids(self._tokenizer, usable, add_special_tokens=self._special)
        return [
            self._fit(tuple(ids)) if is_encodable(text) else Encoded(error="the prompt is not valid Unicode text")
            for text, ids in zip(texts, rows, strict=True)
        ]

    def _fit(self, ids: tuple[int, ...]) -> Encoded:
        limit = self._config.max_tokens
        if not ids:
            return Encoded(error="the prompt has no tokens: the template gave an empty text")
        if len(ids) <= limit:
            return Encoded(ids)
        if self._config.truncation == "error":
            return Encoded(error=f"the prompt has {len(ids)} tokens; prompt.max_tokens is {limit}")
        own = ids[len(self._before) : len(ids) - len(self._after)]
        kept = own[-self._room :] if self._config.truncation == "left" else own[: self._room]
        return Encoded(self._before + kept + self._after, dropped_tokens=len(ids) - limit)


def _token_ids(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    # verbose=False: a text over the model's length is truncated here, it need not be warned of.
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _surrounding(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text, found by looking."""
    (plain,) = _token_ids(tokenizer, [PROBE], add_special_tokens=False)
    (framed,) = _token_ids(tokenizer, [PROBE], add_special_tokens=True)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start]), tuple(framed[start + len(plain) :])
    return (), ()
