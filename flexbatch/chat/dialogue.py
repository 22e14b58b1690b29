"""Turn after turn: messages become tokens that follow on what the model has read, and its tokens become answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flexbatch.chat.answer import AnswerText
from flexbatch.chat.templates import Message, Template, continuation, opening
from flexbatch.engine.conversation import Conversation
from flexbatch.errors import CapacityError, ConfigError, Interrupted
from flexbatch.records import Sampling

Ending = Literal["end", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Speaker:
    """What a dialogue needs besides the conversation: how it is written, and how the model chooses its words."""

    tokenizer: Any
    template: Template
    sampling: Sampling
    end_tokens: frozenset[int]
    pass_seconds: Sequence[float]
    system: str = ""


class Dialogue:
    """Messages on one side, the model's conversation on the other. `ending` says how the last answer ended."""

    def __init__(self, speaker: Speaker, conversation: Conversation) -> None:
        self._speaker, self._conversation = speaker, conversation
        self._stops = (*speaker.template.stops, *speaker.sampling.stop)
        self.ending: Ending = "end"
        self.reset()

    def reset(self) -> None:
        """A new conversation."""
        self.messages: list[Message] = opening(self._speaker.system)
        self._conversation.keep(0)
        self._fed, self._left_out = "", ""

    def ask(self, text: str, stop_asked: Callable[[], bool]) -> Iterator[str]:
        """The answer to a message, in pieces as they become clear. An interrupted answer stays as far as it came;
        a message to which nothing was said yet is taken back.

        Raises:
            CapacityError: the context has no room for the message; ConfigError: the message is not valid Unicode. The
                conversation is then as before.
        """
        before = self._state()
        self._hear(text)
        answer = AnswerText(self._speaker.tokenizer, self._stops)
        heard = len(self._conversation.tokens)
        try:
            yield from self._listen(answer, stop_asked)
        except Interrupted:
            self.ending = "interrupted"
            if not answer.text:
                self._return_to(before)
                return
        except Exception:
            self._return_to(before)
            raise
        yield answer.finish()
        kept, self._left_out = answer.kept_tokens()
        self._conversation.keep(heard + kept)
        self.messages = [*self.messages, {"role": "assistant", "content": answer.text}]

    def _state(self) -> tuple[list[int], list[Message], str, str]:
        return list(self._conversation.tokens), self.messages, self._fed, self._left_out

    def _return_to(self, state: tuple[list[int], list[Message], str, str]) -> None:
        tokens, self.messages, self._fed, self._left_out = state
        self._conversation.rewrite(tokens)

    def _hear(self, text: str) -> None:
        """Puts the message's tokens behind those that the model knows."""
        speaker, conversation = self._speaker, self._conversation
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._tokens(speaker.template.text(messages))
        if len(tokens) >= conversation.context:
            raise CapacityError(
                f"There is no room for this message: {len(tokens) - len(conversation.tokens)} tokens more, where "
                f"{len(conversation.tokens)} of {conversation.context} are taken.",
                remedy="/reset begins a new conversation; start with a larger chat.context for longer ones.",
            )
        conversation.rewrite(tokens)
        self.messages, self._fed = messages, speaker.template.text(messages)

    def _tokens(self, whole: str) -> list[int]:
        """The conversation as it will be, with the tokens that the model knows at its start."""
        known = self._conversation.tokens
        if not known:
            return self._encoded(whole, first=True)
        rest = continuation(self._fed, self.messages[-1]["content"], whole)
        if rest is None:
            return self._encoded(whole, first=True)
        return [*known, *self._encoded(self._left_out + rest, first=False)]

    def _encoded(self, text: str, *, first: bool) -> list[int]:
        tokenizer = self._speaker.tokenizer
        try:
            plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise ConfigError("The message is not valid Unicode text.", remedy="Send UTF-8.") from error
        if not first or not self._speaker.template.special_tokens:
            return plain
        framed: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        starts = range(len(framed) - len(plain) + 1)
        return framed[: next((at for at in starts if framed[at : at + len(plain)] == plain), 0)] + plain

    def _listen(self, answer: AnswerText, stop_asked: Callable[[], bool]) -> Iterator[str]:
        speaker, conversation = self._speaker, self._conversation
        sampling = replace(speaker.sampling, stop=())
        for came in conversation.say(sampling, speaker.pass_seconds, stop_asked):
            for token in came:
                if token in speaker.end_tokens:
                    self.ending = "end"
                    return
                yield answer.add([token])
                if answer.stopped:
                    self.ending = "end"
                    return
        self.ending = "context" if conversation.room <= 0 else "length"
