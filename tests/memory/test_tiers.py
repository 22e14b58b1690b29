"""Memory is admitted before it is used: a limit that cannot be met says which, by how much, and what would fit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.errors import CapacityError, ConfigError, OutputError
from flexbatch.memory.tiers import DiskArena, HostArena, TierBudget, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3GiB", 3 << 30),
        ("512 MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("2g", 2 << 30),
        ("4096", 4096),
        (7, 7),
        ("9B", 9),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "3 GiBs", "1e9", "GiB", "3..5G"])
def test_what_is_no_size_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"offload\.host_memory"):
        parse_bytes(text, key="offload.host_memory")


@given(st.integers(0, 1 << 55))
def test_a_size_that_is_printed_reads_back_within_a_hundredth(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes).replace(" bytes", "")) - nbytes) <= nbytes / 100


@given(st.lists(st.tuples(st.sampled_from(["weights", "kv"]), st.integers(-50, 100)), max_size=40))
def test_a_budget_never_admits_more_than_its_limit(steps: list[tuple[str, int]]) -> None:
    budget = TierBudget("host", 250)
    held = {"weights": 0, "kv": 0}
    peak = 0
    for what, nbytes in steps:
        if nbytes < 0:
            given_back = min(-nbytes, held[what])
            budget.release(given_back, what)
            held[what] -= given_back
        elif sum(held.values()) + nbytes <= 250:
            budget.reserve(nbytes, what)
            held[what] += nbytes
        else:
            with pytest.raises(CapacityError):
                budget.reserve(nbytes, what)
        peak = max(peak, sum(held.values()))
        assert (budget.used, budget.free, budget.peak) == (sum(held.values()), 250 - sum(held.values()), peak)
        assert budget.by_purpose == {name: size for name, size in held.items() if size}


def test_a_refusal_names_tier_need_free_and_key() -> None:
    budget = TierBudget("host", 4 << 30)
    budget.reserve(1 << 30, "weights")
    with pytest.raises(CapacityError) as caught:
        budget.reserve(5 << 30, "KV cache")
    text = str(caught.value)
    for part in ("host tier", "KV cache", "5.00 GiB", "3.00 GiB", "4.00 GiB", "2.00 GiB", "offload.host_memory"):
        assert part in text
    with pytest.raises(ValueError, match="gives back"):
        budget.release(2 << 30, "weights")


def test_a_host_arena_reserves_before_it_allocates_and_gives_back_at_the_end() -> None:
    budget = TierBudget("host", 1000)
    arena = HostArena(budget)
    assert arena.tensor((10, 10), torch.float16, "kv").shape == (10, 10)
    with pytest.raises(CapacityError):
        arena.tensor((1000,), torch.float32, "kv")
    assert budget.used == 200
    arena.close()
    arena.close()
    assert budget.used == 0


def test_tensors_on_disk_keep_their_values_as_long_as_they_are_held(tmp_path: Path) -> None:
    arena = DiskArena(tmp_path, 1 << 20)
    first, second = arena.tensor((3, 5), torch.bfloat16), arena.tensor((1000,), torch.int32)
    assert not first.any()
    first.fill_(2)
    second.copy_(torch.arange(1000))
    assert arena.tensor((0, 4), torch.float32).shape == (0, 4)
    assert first.eq(2).all()
    assert second.equal(torch.arange(1000, dtype=torch.int32))
    arena.close()
    arena.close()
    assert first.eq(2).all()


def test_nothing_is_left_on_disk_however_the_process_ends(tmp_path: Path) -> None:
    arena = DiskArena(tmp_path, 1 << 20)
    arena.tensor((100,), torch.float32).fill_(1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_arena_hands_out_no_more_than_it_has(tmp_path: Path) -> None:
    arena = DiskArena(tmp_path, 8192)
    arena.tensor((1,), torch.float32)
    arena.tensor((1024,), torch.float32)
    with pytest.raises(CapacityError, match="no room"):
        arena.tensor((1,), torch.float32)


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="disk needs") as caught:
        DiskArena(tmp_path, 1 << 50)
    assert "offload.disk_dir" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="No space left"):
        DiskArena(tmp_path, 8192)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/below"):
        DiskArena(tmp_path / "file" / "below", 8192)
