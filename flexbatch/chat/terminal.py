"""The loop of a conversation: a line in, an answer out, on a terminal or through a pipe.

Answers go to standard output and nothing else does; prompts and notices go to standard error.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from flexbatch.chat.dialogue import Dialogue
from flexbatch.chat.saved import default_name, save
from flexbatch.chat.signals import AnswerSignal
from flexbatch.engine.conversation import Conversation
from flexbatch.errors import FlexbatchError, OutputError

HELP = """\
/reset         forget everything and begin a new conversation
/save [FILE]   write the conversation to a JSON file
/help          this
/quit          leave (so do /exit and Ctrl-D)
Ctrl-C stops an answer and keeps the conversation. A line that ends with \\ goes on in the next one.
To begin a message with a slash, put a space before it."""


class Leave(Exception):
    """The user has said goodbye."""


class Terminal:
    """Reads, asks, shows. `unanswered` counts the messages for which there was no room."""

    def __init__(self, dialogue: Dialogue, conversation: Conversation, signals: AnswerSignal, model: str) -> None:
        self._dialogue, self._conversation, self._signals, self._model = dialogue, conversation, signals, model
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._is_interactive = sys.stdin.isatty()
        self._saved: set[Path] = set()
        self._answers, self._seconds = 0, 0.0
        self.unanswered = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._notice(HELP),
            "/quit": self._leave,
            "/exit": self._leave,
        }

    def run(self) -> None:
        """Until the input ends or the user leaves."""
        read = interactive_lines() if self._is_interactive else piped_lines(sys.stdin)
        with suppress(Leave):
            while True:
                try:
                    line = read()
                except KeyboardInterrupt:
                    if not self._is_interactive:
                        raise
                    self._notice("\n/quit or Ctrl-D leaves.")
                    continue
                if line is None:
                    break
                self._take(line)
        self._say_goodbye()

    def _take(self, line: str) -> None:
        """A command, a message, or nothing. What is wrong with one is said; the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line.strip())
        except (FlexbatchError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self._notice(str(error))
            self.unanswered += not line.startswith("/")

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name not in self._commands:
            self._notice(f"There is no {name}; /help lists the commands.")
            return
        self._commands[name](argument.strip())

    def _answer(self, message: str) -> None:
        started, before = time.perf_counter(), self._conversation.counts.said_tokens
        with self._signals.answering():
            pieces = self._dialogue.ask(message, self._signals.is_requested)
            for piece in itertools.chain([self._first(pieces)], pieces, ["\n"]):
                sys.stdout.write(piece)
                sys.stdout.flush()
        seconds = time.perf_counter() - started
        self._answers, self._seconds = self._answers + 1, self._seconds + seconds
        self._explain(self._conversation.counts.said_tokens - before, seconds)

    def _first(self, pieces: Iterator[str]) -> str:
        """The first piece; a terminal shows until then that something is under way."""
        with self._console.status("reading", spinner="dots") if self._is_interactive else nullcontext():
            return next(pieces, "")

    def _explain(self, tokens: int, seconds: float) -> None:
        """How the answer ended, where it did not end by itself; on a terminal, how fast it was."""
        context = self._conversation.context
        endings = {
            "length": "The answer is cut: generation.max_new_tokens is reached.",
            "context": f"The context of {context} tokens is full: /reset begins a new conversation; a larger "
            "chat.context holds longer ones.",
            "interrupted": "Stopped."
            if self._dialogue.messages and self._dialogue.messages[-1]["role"] == "assistant"
            else "Stopped; the message is taken back.",
        }
        if self._dialogue.ending in endings:
            self._notice(endings[self._dialogue.ending])
        if self._is_interactive:
            taken = len(self._conversation.tokens)
            self._notice(f"{tokens} tokens, {tokens / seconds:.3g} per second; {taken} of {context} in the context")

    def _reset(self, _argument: str) -> None:
        self._dialogue.reset()
        self._notice("A new conversation.")

    def _save(self, argument: str) -> None:
        path = Path(argument or default_name()).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise OutputError(f"'{path}' is there already.", remedy="Name another file: /save FILE.")
        save(path, self._model, self._dialogue.messages)
        self._saved.add(path.resolve())
        self._notice(f"Saved to {path}.")

    def _leave(self, _argument: str) -> None:
        raise Leave

    def _say_goodbye(self) -> None:
        counts = self._conversation.counts
        if not counts.passes:
            return
        self._notice(
            f"{self._answers} answers, {counts.said_tokens} tokens in {self._seconds:.3g} s "
            f"({counts.said_tokens / max(self._seconds, 1e-9):.3g} per second, "
            f"{counts.said_tokens / counts.passes:.3g} per pass over the weights)"
        )

    def _notice(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))


def interactive_lines() -> Callable[[], str | None]:
    """Reads from a terminal with line editing and history; None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its keys

    def read() -> str | None:
        lines: list[str] = []
        try:
            while True:
                lines.append(line_after("... " if lines else "> "))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            return None

    return read


def line_after(prompt: str) -> str:
    """`input`, whose prompt must not go where the answers go, if that is a file."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def piped_lines(stream: TextIO) -> Callable[[], str | None]:
    """Reads from a pipe or a file; None at its end."""
    with suppress(AttributeError):
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]

    def read() -> str | None:
        text = ""
        while line := stream.readline():
            text += line.rstrip("\r\n")
            if not text.endswith("\\"):
                return text
            text = text[:-1] + "\n"
        return text or None

    return read
