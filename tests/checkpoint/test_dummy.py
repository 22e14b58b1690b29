"""Dummy weights: true shapes and types, random values, one layer's bytes for all layers, made once."""

from __future__ import annotations

import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, MixtralConfig, OPTConfig, PreTrainedConfig

from flexbatch.checkpoint import dummy
from flexbatch.checkpoint.architecture import expected_tensors
from flexbatch.checkpoint.dummy import dummy_bytes, dummy_index
from flexbatch.errors import CapacityError
from flexbatch.memory.safetensors_index import SafetensorsIndex

OPT = OPTConfig(
    vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=16,
    word_embed_proj_dim=32,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip
GEMMA = Gemma2Config(
    vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


def tensor(index: SafetensorsIndex, name: str) -> torch.Tensor:
    entry = index.entries[name]
    data = bytearray(entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes])
    return torch.frombuffer(data, dtype=entry.torch_dtype).reshape(entry.shape)


@pytest.mark.parametrize("config", [OPT, MIXTRAL, GEMMA], ids=lambda config: config.model_type)
def test_every_tensor_of_the_model_is_there_in_its_true_shape(config: PreTrainedConfig, tmp_path: Path) -> None:
    index = dummy_index(config, torch.bfloat16, tmp_path)
    shapes = expected_tensors(config).shapes
    assert {name: entry.shape for name, entry in index.entries.items()} == shapes
    assert {entry.dtype for entry in index.entries.values()} == {"BF16"}


def test_all_layers_share_one_layers_bytes_and_nothing_else_is_shared(tmp_path: Path) -> None:
    index = dummy_index(OPT, torch.float16, tmp_path)
    places = {name: (entry.file, entry.offset) for name, entry in index.entries.items()}
    first = {name: place for name, place in places.items() if ".layers.0." in name}
    for layer in range(1, 4):
        for name, place in first.items():
            assert places[name.replace(".layers.0.", f".layers.{layer}.")] == place
    assert len(set(places.values())) == len(first) + sum(".layers." not in name for name in places)
    on_disk = sum(file.stat().st_size for file in index.files)
    assert dummy_bytes(OPT, torch.float16) <= on_disk < index.nbytes
    assert index.nbytes == sum(2 * torch.Size(shape).numel() for shape in expected_tensors(OPT).shapes.values())


def test_the_files_are_sound_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    index = dummy_index(OPT, torch.float32, tmp_path)
    for file in index.files:
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_values_are_random_of_the_usual_scale_and_norms_lie_around_one(tmp_path: Path) -> None:
    index = dummy_index(OPT, torch.float32, tmp_path)
    for name in index.entries:
        values = tensor(index, name)
        assert values.unique().numel() > values.numel() // 2, name
        assert 0.01 < values.std() < 0.04, name
        assert abs(values.mean() - (1.0 if "norm.weight" in name else 0.0)) < 0.02, name


def test_gemmas_norms_lie_around_zero_because_it_adds_one_itself(tmp_path: Path) -> None:
    index = dummy_index(GEMMA, torch.float32, tmp_path)
    assert abs(tensor(index, "model.layers.0.input_layernorm.weight").mean()) < 0.02


def test_a_second_call_makes_nothing_and_a_seed_gives_other_values(tmp_path: Path) -> None:
    first = dummy_index(OPT, torch.float32, tmp_path)
    moments = {file: file.stat().st_mtime_ns for file in first.files}
    second = dummy_index(OPT, torch.float32, tmp_path)
    assert second.entries == first.entries
    assert {file: file.stat().st_mtime_ns for file in second.files} == moments
    other = dummy_index(OPT, torch.float32, tmp_path, seed=1)
    name = "model.decoder.layers.0.fc1.weight"
    assert not torch.equal(tensor(other, name), tensor(first, name))


def test_creation_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummy, "CHUNK_ELEMENTS", 500)
    whole = {file.name: file.read_bytes() for file in dummy_index(OPT, torch.bfloat16, tmp_path / "whole").files}
    again = dummy_index(OPT, torch.bfloat16, tmp_path / "again")
    for cut in (0, 7, 4096, 4096 + 999, 4096 + 1000, 4096 + 5003, len(whole["outside.safetensors"]) - 1):
        for file in again.files:
            os.truncate(file, min(cut, file.stat().st_size))
            file.rename(file.with_suffix(".partial"))
        again = dummy_index(OPT, torch.bfloat16, tmp_path / "again")
        assert {file.name: file.read_bytes() for file in again.files} == whole


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(dummy.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(CapacityError, match=r"model\.cache_dir"):
        dummy_index(OPT, torch.float32, tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_opt_175b_needs_five_gigabytes_of_disk_and_streams_349(tmp_path: Path) -> None:
    """Counted from the shapes; nothing is written here."""
    config = OPTConfig(
        vocab_size=50272, hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96,
        word_embed_proj_dim=12288,
    )  # fmt: skip
    assert 4.9e9 < dummy_bytes(config, torch.bfloat16) < 5.0e9
    streamed = sum(2 * torch.Size(shape).numel() for shape in expected_tensors(config).shapes.values())
    assert 349e9 < streamed < 350e9


def test_a_run_that_comes_as_a_file_is_renamed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dummy_index(OPT, torch.bfloat16, tmp_path)
    seen, exists = list[Path](), Path.exists

    def late(path: Path) -> bool:
        """Each file is not there yet at the first look."""
        if path.suffix == ".safetensors" and path not in seen:
            seen.append(path)
            return False
        return exists(path)

    monkeypatch.setattr(dummy, "_check_space", lambda *_: None)
    monkeypatch.setattr(Path, "exists", late)
    dummy_index(OPT, torch.bfloat16, tmp_path)
    assert len(seen) == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_two_runs_at_once_make_the_files_once(tmp_path: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(4) as pool:  # The lock is on the open file, so threads stand for processes here.
        runs = [pool.submit(dummy_index, OPT, torch.bfloat16, tmp_path, report=lines.append) for _ in range(4)]
        entries = [run.result().entries for run in runs]
    assert all(entry == entries[0] for entry in entries)
    assert len(lines) == 2  # one layer, and what is outside the layers
    assert not list(tmp_path.rglob("*.partial"))
