"""Pieces of stored tensors are all that was stored, in order, however many are read ahead."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexbatch.errors import EngineError
from flexbatch.memory import source_pieces
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.memory.source_pieces import Piece, PieceReader, pieces


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
    slice_bytes=st.sampled_from([1, 300, 64 << 20]),
    large_bytes=st.sampled_from([0, 2000, 256 << 20]),
    together=st.integers(1, 2),
)
def test_pieces_are_the_tensor_in_order(
    shapes: list[tuple[int, int]], dtype: torch.dtype, slice_bytes: int, large_bytes: int, together: int
) -> None:
    tensors = {f"t{number}": (torch.randn(shape) * 50).to(dtype) for number, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_pieces, "SLICE_BYTES", slice_bytes)
        patch.setattr(source_pieces, "LARGE_BYTES", large_bytes)
        save_file(tensors, Path(folder) / "model.safetensors")
        entries = SafetensorsIndex.open(Path(folder)).entries
        wanted = [piece for entry in entries.values() for piece in pieces(entry, together)]
        found: dict[str, list[torch.Tensor]] = {name: [] for name in entries}
        ended = []
        with PieceReader() as reader:
            for piece, numbers in reader.read(wanted):
                found[piece.entry.name].append(numbers.clone())
                ended += [piece.entry.name] if piece.is_last else []
    assert ended == list(entries)
    assert all(torch.cat(parts).equal(tensors[name]) for name, parts in found.items())


def test_a_checkpoint_that_ends_too_early_is_an_error_with_file_and_offset(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(64, 64)}, file)
    entry = SafetensorsIndex.open(tmp_path).entries["weight"]
    with file.open("r+b") as stream:
        stream.truncate(5000)
    with PieceReader() as reader, pytest.raises(EngineError, match=r"bytes at byte \d+ of .*model\.safetensors"):
        list(reader.read([Piece.whole(entry)]))
