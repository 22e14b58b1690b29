"""Ctrl-C and SIGTERM: the first asks the run to stop after the pass under way, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from flexbatch.errors import Interrupted

Handler = Callable[[int, FrameType | None], None]


class HeldSignals:
    """As a context manager it holds the handlers of some signals, and gives the earlier ones back."""

    def __init__(self, handlers: Mapping[signal.Signals, Handler]) -> None:
        self._handlers = handlers
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, handler) for number, handler in self._handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class StopSignal(HeldSignals):
    """`requested` turns true at the first SIGINT or SIGTERM.

    Ending at once loses nothing that is finished: parts appear by a rename, and the journal is appended to.
    """

    def __init__(self) -> None:
        super().__init__({signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal})
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for; for the places between two stages."""
        if self.requested:
            raise Interrupted("Stopped.", remedy="The same command goes on where this run stopped.")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            # Reader threads and native code do not hear a KeyboardInterrupt.
            os.write(2, b"\nStopped at once.\n")
            os._exit(Interrupted.exit_code)
        self.requested = True
        os.write(2, b"\nStopping after this pass; once more to stop at once.\n")
