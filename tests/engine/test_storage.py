"""Room on a tier is clean: a masked position's value is still multiplied, by zero, and must not be a NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.engine.opening import Limits
from flexbatch.engine.storage import HiddenStateParking, Storage
from flexbatch.kernels.result_memory import LEAST, result
from flexbatch.memory.direct_io import PAGE
from flexbatch.memory.pages import gives_back
from flexbatch.plan.policy import Shares, Tier


@pytest.mark.parametrize("tier", list(Tier))
def test_new_room_holds_zeros_whatever_was_in_that_memory_before(tier: Tier, tmp_path: Path) -> None:
    storage = Storage(torch.device("cpu"), Limits(disk_folder=tmp_path).budgets(), tmp_path)
    for _ in range(20):
        dirty = [torch.full((4, 3, 40, 16), torch.nan) for _ in range(4)]
        del dirty  # the allocator gives this memory out again
        made = storage.zeros(tier, (4, 3, 40, 16), torch.float32, "KV cache")
        assert torch.count_nonzero(made) == 0
    storage.close()


def private_bytes() -> int:
    """Main memory that is this process's own, without files' pages (proc(5), statm)."""
    resident, of_files = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - of_files) * PAGE


@pytest.mark.skipif(not gives_back(), reason="the system takes no pages back before a mapping ends")
def test_a_kernels_result_that_is_parked_leaves_main_memory_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    storage = Storage(torch.device("cpu"), Limits(disk_folder=tmp_path).budgets(), tmp_path)
    states = result((8, LEAST), torch.bfloat16)
    states.copy_(torch.arange(states.numel()).view_as(states) % 251)
    expected, view, before = states.clone(), states[3:], private_bytes()
    restore = HiddenStateParking(Shares(0, 0), storage).park(states)
    assert before - private_bytes() > 0.9 * states.nbytes
    restore()
    assert torch.equal(states, expected)
    assert torch.equal(view, expected[3:])
    storage.close()
