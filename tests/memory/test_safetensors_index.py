"""The index finds every tensor's bytes from the headers alone, and says what is wrong with a checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.errors import ModelError
from flexbatch.memory.safetensors_index import SafetensorsIndex


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_raw(file: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.randn(3, 4), "b": torch.arange(5)},
        "model-00002-of-00002.safetensors": {"c": torch.randn(2, 2).bfloat16()},
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_every_tensor_is_found_at_its_bytes_in_a_single_file(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 7)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = SafetensorsIndex.open(tmp_path)
    assert index.metadata == {"format": "pt"}
    assert set(index.entries) == set(tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = index.entries[name]
        assert (entry.torch_dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[entry.offset : entry.offset + entry.nbytes] == bytes_of(tensor)


def test_shards_are_found_through_their_index_or_without_one(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    for _ in range(2):
        index = SafetensorsIndex.open(tmp_path)
        assert {name: entry.shape for name, entry in index.entries.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        assert len(index.files) == 2
        assert load_file(index.entries["c"].file)["c"].equal(tensors["c"])
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        SafetensorsIndex.open(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(ModelError, match="'ghost'"):
        SafetensorsIndex.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_unreadable_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        SafetensorsIndex.open(tmp_path)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors"):
        SafetensorsIndex.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="python -m flexbatch import"):
        SafetensorsIndex.open(tmp_path)
    with pytest.raises(ModelError, match="not a folder"):
        SafetensorsIndex.open(tmp_path / "absent")


def test_two_files_with_one_tensor_and_no_index_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"same": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ModelError, match="both hold the tensor 'same'"):
        SafetensorsIndex.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused_before_any_weight_is_read(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"truncated|not a sound safetensors file"):
        SafetensorsIndex.open(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        SafetensorsIndex.open(tmp_path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        ({"a": 1}, "lacks dtype"),
        ({"a": {**GOOD, "dtype": "F3"}}, "type 'F3'"),
        ({"a": {**GOOD, "shape": [3]}}, "needs 12 bytes but has 8"),
        ({"a": {**GOOD, "shape": [-2]}}, "shape"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "lacks"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "'a' and 'b' overlap"),
        ({"a": {**GOOD, "data_offsets": [8, 16]}, "b": {**GOOD, "data_offsets": [16, 24]}}, "'b' ends at byte"),
        ({"__metadata__": 3, "a": GOOD}, "__metadata__"),
    ],
)
def test_a_corrupt_header_is_refused_with_file_and_reason(tmp_path: Path, header: Any, message: str) -> None:
    file = tmp_path / "model.safetensors"
    write_raw(file, header, bytes(16))
    with pytest.raises(ModelError, match=message) as caught:
        SafetensorsIndex.open(tmp_path)
    assert str(file) in caught.value.message
    assert caught.value.remedy


def test_an_absurd_header_length_is_not_allocated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match="header claims"):
        SafetensorsIndex.open(tmp_path)
