"""Vectors cut into padded shards give back exactly the tensors that were put in, however they were cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.checkpoint.flat_parameters import Shard, unflatten
from flexbatch.errors import ModelError
from tests.checkpoint.layouts import fsdp_shards, metaseq_state, model_part, small_opt

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6)


def sharded(shapes: list[list[int]], count: int) -> tuple[dict[str, torch.Tensor], list[Shard]]:
    tensors = {f"t{number}": torch.randn(*shape) for number, shape in enumerate(shapes)}
    vector = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    chunks = list(vector.chunk(count))
    chunks += [vector.new_empty(0)] * (count - len(chunks))
    shards = []
    for chunk in chunks:
        padding = chunks[0].numel() - chunk.numel()
        about = {
            "names": list(tensors),
            "shapes": [tensor.shape for tensor in tensors.values()],
            "numels": [tensor.numel() for tensor in tensors.values()],
            "padding": padding,
        }
        metadata = {"param_metadata": [{"fsdp_path": "a.b", "params": {"flat_param_0": about}}], "buffer_names": []}
        piece = torch.nn.functional.pad(chunk, [0, padding])
        shards.append(Shard("file", {"a.b.flat_param_0": piece}, metadata))
    return tensors, shards


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, count=st.integers(1, 9))
def test_any_tensors_over_any_number_of_shards_come_back_exactly(shapes: list[list[int]], count: int) -> None:
    tensors, shards = sharded(shapes, count)
    found = unflatten(shards, 1, None)
    assert found.keys() == {f"a.b.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(found[f"a.b.{name}"].read(), tensor)


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, count=st.integers(2, 6), lost=st.integers(0, 5))
def test_a_lost_shard_never_goes_unnoticed(shapes: list[list[int]], count: int, lost: int) -> None:
    _, shards = sharded(shapes, count)
    gone = shards.pop(lost % count)
    padding = gone.metadata["param_metadata"][0]["params"]["flat_param_0"]["padding"] if gone.metadata else 0
    if gone.weights["a.b.flat_param_0"].numel() > padding:  # A shard of nothing but padding holds nothing to lose.
        with pytest.raises(ModelError, match="numbers in"):
            unflatten(shards, 1, None)


def test_vectors_without_metadata_ask_for_the_config() -> None:
    (shard,) = fsdp_shards(model_part(metaseq_state(small_opt()), 0, 1), 1, metadata=False)
    with pytest.raises(ModelError, match="--config"):
        unflatten([Shard("reshard-model_part-0.pt", shard["model"], None)], 1, None)


def test_a_config_of_another_size_is_noticed() -> None:
    (shard,) = fsdp_shards(model_part(metaseq_state(small_opt()), 0, 1), 1, metadata=False)
    other = small_opt(ffn_dim=40).config
    with pytest.raises(ModelError, match="config does not belong to it"):
        unflatten([Shard("reshard-model_part-0.pt", shard["model"], None)], 1, other)
