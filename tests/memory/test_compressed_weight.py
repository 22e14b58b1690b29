"""A compressed copy of a checkpoint has its weights bit for bit; what has nothing to gain is left out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexbatch.kernels.exponent_codes import CHUNK, expand
from flexbatch.kernels.float_tile_products import RECORD_INPUTS
from flexbatch.memory import compressed_weight
from flexbatch.memory.blocked_weight import BlockedLayout, blocked_layout, suits
from flexbatch.memory.compressed_weight import (
    CompressedLayout,
    PlainLayout,
    compressed_layouts,
    compressed_share,
    estimated_share,
)
from flexbatch.memory.packed_file import open_packed
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.model_spec import COMPRESSED_CHUNK, COMPRESSED_INPUTS, LARGEST_COMPRESSED

ODD = (700, 600)  # no whole number of chunks


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def any_bits(*shape: int) -> torch.Tensor:
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(0))
    return bits.to(torch.int16).view(torch.bfloat16)


def checkpoint(folder: Path, **tensors: torch.Tensor) -> SafetensorsIndex:
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsIndex.open(folder)


def plain(index: SafetensorsIndex) -> dict[str, PlainLayout | BlockedLayout]:
    return {name: PlainLayout(entry.shape) for name, entry in index.entries.items()}


def expanded(layout: CompressedLayout, records: torch.Tensor) -> torch.Tensor:
    out = torch.empty(layout.room, dtype=torch.bfloat16)
    expand([layout.expansion(records, out)])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_file_gives_the_weights_in_bfloat16(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {"even": normal(512, 256, dtype=dtype), "odd": normal(*ODD, dtype=dtype)}
    index, folder = checkpoint(tmp_path, **weights), tmp_path / "packed"
    layouts = compressed_layouts(index.entries, plain(index), folder)
    packed = open_packed(index, layouts, folder)
    stored = SafetensorsIndex.of_file(packed["odd"].parts["records"].file)
    for name, weight in weights.items():
        records = layouts[name].pack(weight)[0]
        assert stored.entries[f"{name}.records"].nbytes == records.numel()
        made = layouts[name].weight(expanded(layouts[name], records))
        assert torch.equal(made, weight.bfloat16())


@pytest.mark.skipif(not suits(torch.bfloat16), reason="no blocked bfloat16 weights on this machine")
def test_bytes_in_the_processor_s_order_come_back() -> None:
    weight = normal(*ODD)
    layout = CompressedLayout(blocked_layout(ODD), CHUNK)
    assert torch.equal(
        expanded(layout, layout.pack(weight)[0])[: layout.numbers].view(torch.uint8),
        blocked_layout(ODD).pack(weight)[0].view(-1),
    )


def test_what_would_hardly_get_smaller_is_left_out(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, small=normal(64, 64), noise=any_bits(512, 256), large=normal(512, 256))
    assert set(compressed_layouts(index.entries, plain(index), tmp_path / "packed")) == {"large"}
    large, noise = ([index.entries[name]] for name in ("large", "noise"))
    assert 0.70 < estimated_share(large) < 0.72
    assert estimated_share(noise) == 1.0
    assert estimated_share([]) == 1.0


def test_a_checkpoint_is_looked_through_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, folder = checkpoint(tmp_path, weight=normal(512, 256)), tmp_path / "packed"
    entries = list(index.entries.values())
    first = compressed_layouts(index.entries, plain(index), folder)
    assert compressed_share(entries, folder) is None
    open_packed(index, first, folder)
    assert compressed_share(entries, folder) == pytest.approx(first["weight"].share)
    looked = []
    real = compressed_weight.most_exceptions
    monkeypatch.setattr(compressed_weight, "most_exceptions", lambda numbers: looked.append(1) or real(numbers))
    assert compressed_layouts(index.entries, plain(index), folder) == first
    assert not looked
    os.utime(index.files[0], (1, 1))
    assert compressed_share(entries, folder) is None
    assert compressed_layouts(index.entries, plain(index), folder) == first
    assert looked


def test_the_plan_counts_in_the_same_chunks_and_leaves_out_the_same_weights() -> None:
    assert (COMPRESSED_CHUNK, LARGEST_COMPRESSED) == (CHUNK, compressed_weight.LARGEST_SHARE)
    assert COMPRESSED_INPUTS == RECORD_INPUTS


def test_torn_notes_of_what_was_found_are_made_anew(tmp_path: Path) -> None:
    index, folder = checkpoint(tmp_path, weight=normal(512, 256)), tmp_path / "packed"
    first = compressed_layouts(index.entries, plain(index), folder)
    (notes,) = folder.glob("exceptions-*.json")
    notes.write_text(notes.read_text()[:30])
    assert compressed_share(list(index.entries.values()), folder) is None
    assert compressed_layouts(index.entries, plain(index), folder) == first
