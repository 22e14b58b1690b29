"""Ctrl-C and SIGTERM: the first asks the run to stop after the pass under way, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from flexbatch.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """`requested` turns true at the first signal. As a context manager it holds the handlers of both signals.

    Ending at once loses nothing that is finished: parts appear by a rename, and the journal is appended to.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
