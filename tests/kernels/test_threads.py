"""Kernels on several threads: all of the work is done once, and nobody is waited for in vain."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from flexbatch.kernels.threads import _pool, take_turns

PIECES = 100


def _taken(counter: Any, taken: list[int]) -> None:
    while (piece := int(counter[0])) < PIECES:
        counter[0] += 1
        taken.append(piece)


def test_a_thread_that_has_not_begun_when_all_is_taken_is_not_waited_for() -> None:
    gate, taken = threading.Event(), list[int]()
    busy = _pool(2).submit(gate.wait)
    caller = threading.Thread(target=take_turns, args=(lambda counter, _threads: _taken(counter, taken), 2))
    caller.start()
    caller.join(timeout=20)
    waits = caller.is_alive()
    gate.set()
    caller.join()
    assert busy.result()
    assert not waits
    assert taken == list(range(PIECES))


def test_what_fails_on_another_thread_fails_in_the_caller() -> None:
    caller, begun = threading.get_ident(), threading.Event()

    def work(_counter: Any, _threads: int) -> None:
        if threading.get_ident() == caller:
            assert begun.wait(timeout=20)
            return
        begun.set()
        raise ValueError("on another thread")

    with pytest.raises(ValueError, match="on another thread"):
        take_turns(work, 2)
