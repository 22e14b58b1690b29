"""Room on a tier is clean: a masked position's value is still multiplied, by zero, and must not be a NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.engine.opening import Limits
from flexbatch.engine.storage import Storage
from flexbatch.plan.policy import Tier


@pytest.mark.parametrize("tier", list(Tier))
def test_new_room_holds_zeros_whatever_was_in_that_memory_before(tier: Tier, tmp_path: Path) -> None:
    storage = Storage(torch.device("cpu"), Limits(disk_folder=tmp_path).budgets(), tmp_path)
    for _ in range(20):
        dirty = [torch.full((4, 3, 40, 16), torch.nan) for _ in range(4)]
        del dirty  # the allocator gives this memory out again
        made = storage.zeros(tier, (4, 3, 40, 16), torch.float32, "KV cache")
        assert torch.count_nonzero(made) == 0
    storage.close()
