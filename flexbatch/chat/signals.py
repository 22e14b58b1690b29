"""Ctrl-C in a conversation: during an answer it ends the answer, anywhere else it is a KeyboardInterrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flexbatch.errors import Interrupted
from flexbatch.interrupt import HeldSignals


class AnswerSignal(HeldSignals):
    """Inside `answering` the first Ctrl-C makes `requested` true; a second ends the conversation, as SIGTERM does."""

    def __init__(self) -> None:
        super().__init__({signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_end})
        self.requested = self._answering = False

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
