"""Kernels on all of torch's threads: each takes every n-th piece of the work, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def on_all_threads(work: Callable[[int, int], None], threads: int | None = None) -> None:
    """Calls `work(first, step)` for each of `threads` (torch's own number) firsts, and waits; errors come here."""
    step = threads or torch.get_num_threads()
    others = [_pool(step).submit(work, first, step) for first in range(1, step)]
    work(0, step)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kernel")
