"""Says that weights are being packed, and how far that is: for a large model it takes minutes, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from flexbatch.plan.limits import gibibytes

EVERY_SECONDS = 10.0


class PackingNotice:
    """Called with bytes packed so far and all of them; writes a line at the beginning, every few seconds, and at the
    end. `check` is called each time and may raise to stop it; what is packed is kept."""

    def __init__(self, stream: TextIO, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check
        self._said = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= EVERY_SECONDS or done == total:
            self._said = now
            print(f"packing the weights, once: {gibibytes(done)} of {gibibytes(total)}", file=self._stream, flush=True)
        self._check()
