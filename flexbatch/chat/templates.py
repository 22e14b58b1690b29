"""How a conversation reads as text: the tokenizer's own chat template, or one of human and assistant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexbatch.config import Config
from flexbatch.errors import PromptError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as Transformers' chat templates take them."""

PREAMBLE = "This is a conversation between a human and an assistant. The assistant answers helpfully and to the point."


class Template(Protocol):
    """Turns messages into the text up to the model's next words. Answers end before any of `stops`."""

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> tuple[str, ...]: ...

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer's special tokens go before the whole (a chat template has them as text)."""
        ...

    def text(self, messages: Sequence[Message]) -> str: ...


@dataclass(frozen=True)
class HumanAssistant:
    """For models that were trained on plain text (OPT, BLOOM): who speaks stands before each turn."""

    special_tokens: bool = True
    name: str = "human and assistant"
    stops: tuple[str, ...] = ("\nHuman:",)

    def text(self, messages: Sequence[Message]) -> str:
        parts = [PREAMBLE] if messages[0]["role"] != "system" else []
        names = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
        parts += [names[message["role"]] + message["content"] for message in messages]
        return "\n".join([*parts, "Assistant:"])


@dataclass(frozen=True)
class TokenizersOwn:
    """The chat template that came with the tokenizer. It writes the special tokens itself."""

    tokenizer: Any
    name: str = "the tokenizer's own"
    stops: tuple[str, ...] = ()
    special_tokens: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        made: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return made


def choose_template(config: Config, tokenizer: Any) -> Template:
    """The template of `chat.template`. PromptError for one that is not there or does not take the system message."""
    wanted, has_own = config.chat.template, bool(getattr(tokenizer, "chat_template", None))
    if wanted == "human" or (wanted == "auto" and not has_own):
        return HumanAssistant(config.prompt.special_tokens)
    if not has_own:
        raise PromptError(
            "chat.template=tokenizer, but the model's tokenizer has no chat template.",
            remedy="Leave chat.template at auto: the conversation is then written as that of a human and an assistant.",
        )
    own = TokenizersOwn(tokenizer)
    try:
        own.text([*opening(config.prompt.system), {"role": "user", "content": "a"}])
    except Exception as error:  # the template is the model author's program
        raise PromptError(
            f"The tokenizer's chat template fails: {error}",
            remedy="Leave prompt.system empty if the model has no system message; or set chat.template=human.",
        ) from error
    return own


def opening(system: str) -> list[Message]:
    """The messages with which a conversation begins."""
    return [{"role": "system", "content": system}] if system else []


def continuation(fed: str, answer: str, whole: str) -> str | None:
    """What comes in `whole` after the text that was fed and the answer to it, or None where `whole` goes another way
    (a template that leaves the thoughts of earlier turns out, say). White space around the answer does not count."""
    if not whole.startswith(fed):
        return None
    rest = whole[len(fed) :].lstrip()
    said = answer.strip()
    return rest[len(said) :] if rest.startswith(said) else None
