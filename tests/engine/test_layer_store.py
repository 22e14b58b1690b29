"""A layer's room in the KV cache is made with that of the layer before it, if their keys look the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.layer_store import KV
from flexbatch.engine.opening import Limits
from flexbatch.engine.storage import Storage
from flexbatch.plan.policy import Tier

SLOTS, SPAN, SLACK = 3, 6, 2


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(torch.device("cpu"), Limits(disk_folder=tmp_path).budgets(), tmp_path)


def keys(heads: int = 2, size: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(heads * 5 * size, dtype=dtype).view(1, heads, 5, size)


def held(storage: Storage) -> int:
    return storage.budgets[Tier.DEVICE].by_purpose.get(KV, 0)


def layer_bytes(like: torch.Tensor) -> int:
    return 2 * SLOTS * (SPAN + SLACK) * like.shape[1] * like.shape[3] * like.itemsize


def test_the_next_layer_has_its_room_before_its_keys_come_and_the_last_has_none_behind_it(storage: Storage) -> None:
    arena = KVArena([(SLOTS, 0)] * 3, SLOTS, SPAN, SLACK, storage)
    arena.layers[0].prepare(keys(), keys())
    assert [len(layer.segments) for layer in arena.layers] == [1, 1, 0]
    for layer in arena.layers:
        layer.prepare(keys(), keys())
    assert held(storage) == 3 * layer_bytes(keys())


@pytest.mark.parametrize("other", [keys(heads=1), keys(size=8), keys(dtype=torch.float64)])
def test_keys_that_look_otherwise_get_room_of_their_own_and_nothing_else_is_held(
    other: torch.Tensor, storage: Storage
) -> None:
    arena = KVArena([(SLOTS, 0)] * 2, SLOTS, SPAN, SLACK, storage)
    arena.layers[0].prepare(keys(), keys())
    arena.layers[1].prepare(other, other)
    arena.layers[1].write_prompts([1], arena.end, arena.layers[1].pack(other, other), [5])
    whole = arena.layers[1].in_one_place(2, arena.end - 4, arena.end)
    assert whole is not None
    assert torch.equal(whole[0][1], other[0])
    assert held(storage) == layer_bytes(keys()) + layer_bytes(other)


def test_rows_that_are_written_stay_when_their_layer_is_prepared_again(storage: Storage) -> None:
    arena = KVArena([(SLOTS, 0)] * 2, SLOTS, SPAN, SLACK, storage)
    for layer in arena.layers:
        layer.prepare(keys(), keys())
        layer.write_prompts([0], arena.end, layer.pack(keys(), keys()), [5])
    arena.layers[0].prepare(keys(), keys())
    for layer in arena.layers:
        whole = layer.in_one_place(1, arena.end - 4, arena.end)
        assert whole is not None
        assert torch.equal(whole[1], keys())


def test_room_on_the_disk_is_made_when_its_keys_come(storage: Storage) -> None:
    arena = KVArena([(SLOTS, 0), (1, 0)], SLOTS, SPAN, SLACK, storage)
    arena.layers[0].prepare(keys(), keys())
    assert not arena.layers[1].segments
    storage.close()
