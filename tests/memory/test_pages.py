"""Memory that is given back is gone from the process, and zeros when it is used again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from flexbatch.memory.direct_io import PAGE, AlignedBuffer
from flexbatch.memory.heap import Heap, counted_bytes
from flexbatch.memory.pages import TouchingAhead, give_back, gives_back, populates

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not gives_back(), reason="the system takes no pages back before a mapping ends")


def test_pages_that_are_given_back_leave_the_process() -> None:
    memory = AlignedBuffer(64 * MIB).tensor.fill_(7)
    before = counted_bytes()
    give_back(memory[16 * MIB :])
    assert before - counted_bytes() > 40 * MIB
    assert memory[: 16 * MIB].eq(7).all()


def test_pages_that_are_given_back_are_zeros_and_their_neighbours_stay() -> None:
    memory = AlignedBuffer(8 * PAGE).tensor.fill_(7)
    give_back(memory[PAGE + 100 : 4 * PAGE + 100])
    expected = torch.full_like(memory, 7)
    expected[2 * PAGE : 4 * PAGE] = 0
    assert torch.equal(memory, expected)


def test_less_than_a_page_is_left_alone() -> None:
    memory = AlignedBuffer(2 * PAGE).tensor.fill_(7)
    give_back(memory[10 : PAGE + 10])
    assert memory.eq(7).all()


def until(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so within ten seconds."""
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.mark.skipif(not populates(), reason="no madvise that populates")
def test_memory_is_there_before_its_first_use_and_what_is_written_meanwhile_stays() -> None:
    memory, ahead = AlignedBuffer(64 * MIB).tensor, TouchingAhead(lambda _nbytes: True)
    before = counted_bytes()
    ahead.touch(memory)
    memory[::4096] = 7
    assert until(lambda: counted_bytes() - before > 48 * MIB)
    ahead.stop()
    assert (memory[::4096] == 7).all()
    assert memory.count_nonzero() == len(memory[::4096])


@pytest.mark.skipif(not populates(), reason="no madvise that populates")
def test_nothing_is_touched_once_it_is_stopped() -> None:
    first, second = AlignedBuffer(64 * MIB).tensor, AlignedBuffer(64 * MIB).tensor
    ahead = TouchingAhead(lambda _nbytes: True)
    ahead.touch(first)
    ahead.stop()
    give_back(first)
    before = counted_bytes()
    ahead.touch(second)
    time.sleep(0.2)
    assert counted_bytes() - before < 16 * MIB


@pytest.mark.skipif(not populates(), reason="no madvise that populates")
def test_no_more_is_touched_than_there_is_room_for() -> None:
    before = counted_bytes()
    ahead = TouchingAhead(Heap(before + 48 * MIB, headroom=16 * MIB).has_room)
    memory = AlignedBuffer(64 * MIB).tensor
    ahead.touch(memory)
    assert until(lambda: counted_bytes() - before > 20 * MIB)
    time.sleep(0.2)
    assert counted_bytes() - before < 40 * MIB
    ahead.stop()
