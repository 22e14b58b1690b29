"""Kernels on several threads: all of the work is done once, and nobody is waited for in vain."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from flexbatch.kernels.threads import _pool, do_all, take_turns

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


def test_each_of_several_tasks_is_done_once_by_whoever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    first, done = threading.Event(), list[tuple[int, int]]()

    def task(number: int) -> None:
        if number == 0:
            assert first.wait(timeout=20), "the others wait for the first one's thread"
        done.append((number, threading.get_ident()))
        if number == 3:
            first.set()

    do_all(*(partial(task, number) for number in range(4)))
    assert sorted(number for number, _ in done) == [0, 1, 2, 3]
    assert len({thread for _, thread in done}) == 2


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
