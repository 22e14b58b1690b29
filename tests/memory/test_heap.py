"""Memory that was freed is given back when the limit is near, and only then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flexbatch.memory import heap
from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.memory.heap import STEP, Heap, counted_bytes

MIB = 1 << 20

pytestmark = pytest.mark.skipif(heap._malloc_trim() is None, reason="no glibc, or no /proc")


def holes() -> list[torch.Tensor]:
    """The blocks that are still in use of some 160 MiB, all of which the heap keeps."""
    blocks = [torch.ones(16 << 10) for _ in range(2560)]  # 64 KiB each: below what malloc maps by itself
    return blocks[::64]


def test_freed_memory_is_given_back_near_the_limit() -> None:
    kept = holes()
    before = counted_bytes()
    Heap(before + 16 * MIB, headroom=32 * MIB).settle()
    assert before - counted_bytes() > 100 * MIB
    assert all((block == 1).all() for block in kept)


def test_far_from_the_limit_it_stays_for_the_next_use() -> None:
    kept = holes()
    before = counted_bytes()
    Heap(before + 64 * MIB, headroom=32 * MIB).settle()
    assert counted_bytes() > before - 16 * MIB
    assert len(kept) == 40


def test_headroom_that_others_get_is_given_back_at_once_and_guarded_no_longer() -> None:
    first = holes()
    before = counted_bytes()
    mine = Heap(before + 64 * MIB, headroom=96 * MIB)
    mine.lend(64 * MIB)
    assert before - counted_bytes() > 100 * MIB
    second = holes()
    near = counted_bytes()
    mine.settle()  # what lies 32 MiB below the limit is enough now
    assert near - counted_bytes() < 16 * MIB
    assert len(first) == len(second) == 40


def test_a_step_that_takes_more_is_given_room_earlier() -> None:
    kept = holes()
    before = counted_bytes()
    Heap(before + 64 * MIB, headroom=96 * MIB).settle()
    assert before - counted_bytes() > 100 * MIB
    assert len(kept) == 40


def test_what_stays_leaves_a_quarter_of_the_headroom_to_blocks_that_are_not_found_again() -> None:
    grown = AlignedBuffer(160 * MIB)
    grown.tensor.fill_(1)
    before = counted_bytes()
    full = Heap(before + 80 * MIB, headroom=240 * MIB)  # a process that holds more than was planned
    first = holes()
    full.settle()
    second = holes()
    full.settle()
    assert counted_bytes() < before + 80 * MIB
    assert len(first) == len(second) == 40


def test_files_pages_that_the_kernel_took_away_still_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    statm, page = tmp_path / "statm", os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(heap, "_STATM", statm)
    statm.write_text(f"900000 {(500 * MIB + heap.BESIDE) // page} {heap.BESIDE // page} 1 0 1 0")
    before = counted_bytes()
    statm.write_text(f"900000 {500 * MIB // page} 0 1 0 1 0")
    assert counted_bytes() == before == 500 * MIB + heap.BESIDE


def test_it_is_not_asked_for_again_before_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: lambda: calls.append(True))
    full = Heap(limit=MIB, headroom=0)
    full.settle()
    full.settle()
    assert len(calls) == 1
    grown = AlignedBuffer(4 * STEP)  # beside the heap, which may still have room
    grown.tensor.fill_(1)
    full.settle()
    assert len(calls) == 2


def test_what_a_call_frees_stays_for_the_next_one_once_what_was_free_before_is_given_back() -> None:
    before = counted_bytes()
    full = Heap(before + 240 * MIB, headroom=240 * MIB)
    first = holes()
    full.settle()
    after = counted_bytes()
    assert before + 160 * MIB - after > 100 * MIB
    second = holes()  # some 160 MiB again, less than three quarters of what a call may take
    full.settle()
    assert counted_bytes() - after > 100 * MIB
    grown = AlignedBuffer(64 * MIB)  # beside the heap: with what it keeps more than three quarters
    grown.tensor.fill_(1)
    full.settle()
    assert counted_bytes() - after < 100 * MIB
    assert len(first) == len(second) == 40
