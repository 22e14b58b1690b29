"""How long a piece of work takes, and what several measurements of it say."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Work:
    """Something to be timed on `device`: what `run` does is worth `amount` of a unit (FLOP, bytes)."""

    run: Callable[[], object]
    amount: float
    device: torch.device

    def rate(self, at_least: float = 0.05) -> float:
        """Units per second, from calls that take `at_least` seconds together."""
        return self.amount / seconds_of(self.run, self.device, at_least)


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.05) -> float:
    """Mean seconds of one call, over calls that take `at_least` seconds together, after one to warm up: it may compile
    a kernel, and finds its memory. How many they are goes by the faster of two, because one alone may be held up by
    what else runs, and would be taken for a long one."""

    def calls(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    calls(1)
    once = calls(1)
    if once < 4 * at_least:
        once = min(once, calls(1))
    count = math.ceil(at_least / max(once, 1e-6))
    return once if count <= 1 else calls(min(count, 10_000))


def medians(rounds: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """The median of each figure, figures of figures too."""
    return {
        key: medians([each[key] for each in rounds])
        if isinstance(value, Mapping)
        else statistics.median(each[key] for each in rounds)
        for key, value in rounds[0].items()
    }
