"""A large result's memory goes to the next ones, and to nobody while somebody has it."""

from __future__ import annotations

import mmap
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexbatch.errors import CapacityError
from flexbatch.kernels import result_memory
from flexbatch.kernels.result_memory import LEAST, STEPS, give_back_free, result
from flexbatch.memory.heap import counted_bytes
from flexbatch.memory.pages import gives_back

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_free() -> None:
    give_back_free()


def bytes_of(nbytes: int) -> torch.Tensor:
    return result((nbytes,), torch.uint8)


def test_a_result_has_the_shape_and_type_that_were_asked_for_however_large_it_is() -> None:
    for rows in (3, 4096):
        made = result((rows, 5, 512), torch.bfloat16)
        assert (made.shape, made.dtype, made.is_contiguous()) == ((rows, 5, 512), torch.bfloat16, True)


def test_the_next_result_of_like_size_has_the_memory_of_one_that_is_gone() -> None:
    first = bytes_of(LEAST + 1)
    place = first.data_ptr()
    del first
    assert bytes_of(LEAST + LEAST // STEPS).data_ptr() == place


def test_a_view_keeps_the_memory_of_its_result() -> None:
    view = bytes_of(LEAST).fill_(7).view(-1, 64)[100:]
    bytes_of(LEAST).fill_(8)
    assert view.eq(7).all()


def test_no_two_results_that_somebody_has_share_memory() -> None:
    chance, held = random.Random(3), {}
    for turn in range(200):
        value = turn % 251
        held[value] = bytes_of(chance.choice([LEAST, LEAST + 1, 2 * LEAST, 5 * LEAST])).fill_(value)
        if len(held) > 5:
            del held[chance.choice(list(held))]
        assert all(each[0] == value == each[-1] and each[:: 1 << 12].eq(value).all() for value, each in held.items())


def test_results_that_grow_leave_no_memory_behind() -> None:
    for size in range(LEAST, 16 * LEAST, LEAST // 2):
        bytes_of(size)
    assert sum(len(each) for each in result_memory._free()) <= 20 * LEAST


def test_a_small_result_takes_no_large_memory() -> None:
    big = bytes_of(64 * MIB)
    place = big.data_ptr()
    del big
    assert bytes_of(LEAST).data_ptr() != place


def test_results_of_several_threads_share_no_memory() -> None:
    def made(value: int) -> bool:
        return all(bytes_of(LEAST).fill_(value).eq(value).all() for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(made, range(8)))


@pytest.mark.skipif(not gives_back(), reason="what a process holds is told on Linux")
def test_what_no_result_is_in_can_be_given_back() -> None:
    bytes_of(64 * MIB).fill_(1)
    before = counted_bytes()
    give_back_free()
    assert before - counted_bytes() > 60 * MIB


def test_a_result_that_memory_has_no_room_for_is_told_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(CapacityError, match=f"result of {5 * MIB} bytes .*Cannot allocate"):
        bytes_of(5 * MIB)
