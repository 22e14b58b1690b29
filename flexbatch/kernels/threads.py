"""Kernels on all of torch's threads, without Python's lock.

Each takes every n-th piece of the work, or, where pieces are many and other threads may be in the way, the next one
that nobody has taken. Then none waits for a thread that wakes up late: what is left for it is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

WAKING = 1 << 24
"""Multiplications (of pairs, where they come in pairs) that one thread does while another wakes up: 0.4 ms on a virtual
machine."""


def on_all_threads(work: Callable[[int, int], None], threads: int | None = None) -> None:
    """Calls `work(first, step)` for each of `threads` (torch's own number) firsts, and waits; errors come here."""
    step = threads or torch.get_num_threads()
    others = [_pool(step).submit(work, first, step) for first in range(1, step)]
    work(0, step)
    for other in others:
        other.result()


def share_out(kernel: Any, *arguments: Any, operations: int) -> None:
    """Calls `kernel(counter, *arguments)` on each of torch's threads, which `take` pieces from the same counter; on
    this one alone where there are so few `operations` that waking others would take longer."""
    take_turns(lambda counter, _threads: kernel(counter, *arguments), 1 if operations < WAKING else None)


def take_turns(work: Callable[[Any, int], None], threads: int | None = None) -> None:
    """Calls `work(counter, threads)` on each of `threads` (torch's own number), which `take` pieces from the same
    counter until there are none, and waits; errors come here. One that has not begun when all is taken never does."""
    threads = threads or torch.get_num_threads()
    counter = new_counter()
    others = [_pool(threads).submit(work, counter, threads) for _ in range(1, threads)]
    work(counter, threads)
    for other in others:
        if not other.cancel():
            other.result()


def do_all(*tasks: Callable[[], None]) -> None:
    """Does all of these, which do not depend on each other, on torch's threads, and waits; errors come here."""
    left = iter(tasks)

    def work(_counter: Any, _threads: int) -> None:
        for task in left:
            task()

    take_turns(work, min(len(tasks), torch.get_num_threads()))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kernel")


def new_counter() -> Any:
    """For `take`: nothing is taken yet."""
    return np.zeros(1, np.int64)


def _add_to(_context: Any, counter: Any, many: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", memory, arguments[1], "seq_cst")

    return types.int64(counter, types.int64), generate


add_to: Any = intrinsic(_add_to)
"""In a kernel: adds to a counter that other threads see; what it was before."""


@njit(nogil=True, inline="always")
def take(counter: Any) -> Any:
    """In a kernel: the number of the next piece, from 0 on; no two threads get the same one."""
    return add_to(counter, 1)
