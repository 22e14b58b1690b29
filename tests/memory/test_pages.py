"""Memory that is given back is gone from the process, and zeros when it is used again."""

from __future__ import annotations

import pytest
import torch

from flexbatch.memory.direct_io import PAGE, AlignedBuffer
from flexbatch.memory.heap import counted_bytes
from flexbatch.memory.pages import give_back, gives_back

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
