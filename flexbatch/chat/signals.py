"""Ctrl-C in a conversation: during an answer it ends the answer, anywhere else it is a KeyboardInterrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from flexbatch.errors import Interrupted


class AnswerSignal:
    """As a context manager it holds the handlers of SIGINT and SIGTERM.

    Inside `answering` the first Ctrl-C makes `requested` true; a second one ends the conversation.
    """

    def __init__(self) -> None:
        self.requested = self._answering = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> AnswerSignal:
        handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_end}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.requested, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False

    def is_requested(self) -> bool:
        return self.requested

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self._answering or self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _on_end(self, _number: int, _frame: FrameType | None) -> None:
        raise SystemExit(Interrupted.exit_code)
