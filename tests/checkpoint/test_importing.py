"""An import gives back exactly the published weights, whatever their form, and never half a model."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import struct
import time
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from flexbatch.checkpoint import importing, torch_files
from flexbatch.checkpoint.importing import import_checkpoint, is_complete, verify_import
from flexbatch.errors import CapacityError, FlexbatchError, ModelError, OutputError
from tests.checkpoint.layouts import (
    HIDDEN,
    fsdp_shards,
    metaseq_state,
    model_part,
    save_bin_shards,
    save_numpy_folder,
    scramble,
    separate_state,
    small_opt,
    training_options,
)


def assert_same_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Transformers' own loading of `folder` has every tensor of `model`, bit for bit."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def opt() -> PreTrainedModel:
    return small_opt()


def halves(model: PreTrainedModel) -> list[list[str]]:
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    return [names[: len(names) // 2], names[len(names) // 2 :]]


@pytest.mark.parametrize("index", [True, False])
def test_bin_shards_with_and_without_index_come_back_exactly(tmp_path: Path, opt: PreTrainedModel, index: bool) -> None:
    save_bin_shards(opt, tmp_path / "source", halves(opt), index=index)
    import_checkpoint(tmp_path / "source", tmp_path / "target", shard_bytes=8000)
    assert (tmp_path / "target" / "model.safetensors.index.json").exists()
    assert_same_model(tmp_path / "target", opt)


def test_one_bin_file_with_a_tied_head_stored_twice_keeps_it_once(tmp_path: Path, opt: PreTrainedModel) -> None:
    (tmp_path / "source").mkdir()
    opt.config.save_pretrained(tmp_path / "source")
    torch.save(opt.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    import_checkpoint(tmp_path / "source", tmp_path / "target")
    assert_same_model(tmp_path / "target", opt)
    size = (tmp_path / "target" / "model.safetensors").stat().st_size
    assert size < sum(parameter.nbytes for parameter in opt.parameters()) + 10_000


def test_a_legacy_pickle_without_zip_is_read_too(tmp_path: Path, opt: PreTrainedModel) -> None:
    (tmp_path / "source").mkdir()
    opt.config.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "pytorch_model.bin"
    torch.save(opt.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target"), opt)


def test_of_several_legacy_pickles_one_at_a_time_is_in_memory(
    tmp_path: Path, opt: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, names, alive, most = tmp_path / "source", list(opt.state_dict()), [], []
    opt.config.save_pretrained(source)
    for shard in range(4):
        part = {name: opt.state_dict()[name].clone() for name in names[shard::4]}
        file = source / f"pytorch_model-0000{shard + 1}-of-00004.bin"
        torch.save(part, file, _use_new_zipfile_serialization=False)
    load = torch_files.load_pickle

    def watched(file: Path) -> Any:
        state = load(file)
        alive.append([weakref.ref(value) for value in state.values()])
        most.append(sum(any(each() is not None for each in shard) for shard in alive))
        return state

    monkeypatch.setattr(torch_files, "load_pickle", watched)
    assert_same_model(import_checkpoint(source, tmp_path / "target"), opt)
    assert max(most) <= 2, "the file before is given back as the next one has come"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_the_type_that_they_were_saved_in(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_opt().to(dtype)
    save_bin_shards(model, tmp_path / "source", halves(model), index=True)
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target"), model, dtype)


def bloom() -> PreTrainedModel:
    return scramble(BloomForCausalLM(BloomConfig(vocab_size=120, hidden_size=16, n_layer=2, n_head=2)))


def codegen() -> PreTrainedModel:
    config = CodeGenConfig(vocab_size=120, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32, n_ctx=32)
    return scramble(CodeGenForCausalLM(config))


def test_bloom_names_without_their_prefix_come_back_exactly(tmp_path: Path) -> None:
    model = bloom()
    (tmp_path / "source").mkdir()
    model.config.save_pretrained(tmp_path / "source")
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # As on the hub.
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target"), model)


def test_masks_that_old_checkpoints_saved_with_the_weights_are_left_out(tmp_path: Path) -> None:
    model = codegen()
    (tmp_path / "source").mkdir()
    model.config.save_pretrained(tmp_path / "source")
    masks = {f"transformer.h.{layer}.attn.causal_mask": torch.ones(1, 1, 32, 32) for layer in range(2)}
    torch.save(model.state_dict() | masks, tmp_path / "source" / "pytorch_model.bin")
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target"), model)


def test_the_experts_of_a_mixture_are_kept_as_published_and_load_as_one(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = scramble(MixtralForCausalLM(config))
    model.save_pretrained(tmp_path / "published")  # Transformers writes the published names: one tensor per expert.
    from safetensors.torch import load_file

    state = load_file(tmp_path / "published" / "model.safetensors")
    assert any(".experts.3.w2." in name for name in state)
    (tmp_path / "source").mkdir()
    config.save_pretrained(tmp_path / "source")
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target"), model)


def test_a_numpy_folder_of_flexgen_comes_back_exactly(tmp_path: Path, opt: PreTrainedModel) -> None:
    save_numpy_folder(opt, tmp_path / "opt-np")
    target = import_checkpoint(tmp_path / "opt-np", tmp_path / "target", config=opt.config.to_dict())
    assert_same_model(target, opt)


def test_consolidated_metaseq_comes_back_exactly_fused_and_apart(tmp_path: Path, opt: Any) -> None:
    for number, state in enumerate([metaseq_state(opt), separate_state(opt)]):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        torch.save({"model": state} | training_options(), source / "restored.pt")
        target = import_checkpoint(source, tmp_path / f"target-{number}", config=opt.config.to_dict())
        assert_same_model(target, opt)


def test_the_post_norm_350m_layout_with_its_projections_comes_back_exactly(tmp_path: Path) -> None:
    model = small_opt(word_embed_proj_dim=8, do_layer_norm_before=False)
    torch.save({"model": separate_state(model)}, tmp_path / "reshard.pt")
    target = import_checkpoint(tmp_path / "reshard.pt", tmp_path / "target", config=model.config.to_dict())
    assert_same_model(target, model)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_metaseq_model_parts_come_back_exactly_without_the_padding_rows(tmp_path: Path, opt: Any, parts: int) -> None:
    for part in range(parts):
        piece = {"model": model_part(metaseq_state(opt), part, parts)} | training_options()
        torch.save(piece, tmp_path / f"reshard-model_part-{part}.pt")
    target = import_checkpoint(tmp_path, tmp_path / "target", config=opt.config.to_dict())
    assert_same_model(target, opt)


@pytest.mark.parametrize(("parts", "shards"), [(1, 3), (2, 5), (4, 7)])
def test_the_shards_of_model_parts_come_back_exactly(tmp_path: Path, opt: Any, parts: int, shards: int) -> None:
    """OPT-175B's own layout: `checkpoint_last-model_part-{0..7}-shard{0..123}.pt`."""
    for part in range(parts):
        for number, shard in enumerate(fsdp_shards(model_part(metaseq_state(opt), part, parts), shards, metadata=True)):
            torch.save(shard, tmp_path / f"checkpoint_last-model_part-{part}-shard{number}.pt")
    target = import_checkpoint(tmp_path / "checkpoint_last", tmp_path / "target", config=opt.config.to_dict())
    assert_same_model(target, opt)


@pytest.mark.parametrize(("parts", "shards"), [(1, 1), (2, 1), (2, 3)])
def test_flattened_parts_without_metadata_come_back_exactly(tmp_path: Path, opt: Any, parts: int, shards: int) -> None:
    for part in range(parts):
        for number, shard in enumerate(
            fsdp_shards(model_part(metaseq_state(opt), part, parts), shards, metadata=False)
        ):
            suffix = f"-shard{number}" if shards > 1 else ""
            torch.save(shard, tmp_path / f"reshard-model_part-{part}{suffix}.pt")
    target = import_checkpoint(tmp_path, tmp_path / "target", config=opt.config.to_dict())
    assert_same_model(target, opt)


def test_the_config_of_an_opt_of_a_published_width_is_read_off_its_shapes(tmp_path: Path) -> None:
    model = small_opt(hidden_size=768, num_attention_heads=12, ffn_dim=64, word_embed_proj_dim=768, num_hidden_layers=1)
    save_numpy_folder(model, tmp_path / "opt-np")
    assert_same_model(import_checkpoint(tmp_path / "opt-np", tmp_path / "target"), model)


def test_an_import_killed_at_any_moment_goes_on_and_gives_the_same_files(tmp_path: Path) -> None:
    model = small_opt(num_hidden_layers=12, hidden_size=64, num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=64)
    save_bin_shards(model, tmp_path / "source", halves(model), index=True)
    target = tmp_path / "target"
    seen, report = multiprocessing.Pipe(duplex=False)

    def slow_import() -> None:
        def say(line: str) -> None:
            report.send(line)
            time.sleep(0.05)

        import_checkpoint(tmp_path / "source", target, shard_bytes=100_000, report=say)

    # A fork starts at once; a new interpreter would spend seconds on importing torch.
    process = multiprocessing.get_context("fork").Process(target=slow_import)
    process.start()
    for _ in range(8):
        assert seen.recv().startswith("Writing")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not is_complete(target)
    kept = {file.name: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    assert 6 <= len(kept) < 20
    import_checkpoint(tmp_path / "source", target, shard_bytes=100_000)
    recorded = json.loads((target / importing.MANIFEST).read_text())["sha256"]
    later = {file.name: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    assert sum(later[name] == moment for name, moment in kept.items()) >= len(kept) - 1
    assert verify_import(target) == len(recorded)
    assert_same_model(target, model)
    import_checkpoint(tmp_path / "source", tmp_path / "again", shard_bytes=100_000)
    assert recorded == json.loads((tmp_path / "again" / importing.MANIFEST).read_text())["sha256"]


def test_a_file_that_changed_after_the_import_is_named(tmp_path: Path, opt: PreTrainedModel) -> None:
    save_bin_shards(opt, tmp_path / "source", halves(opt), index=True)
    target = import_checkpoint(tmp_path / "source", tmp_path / "target")
    with (target / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or not as it was imported"):
        verify_import(target)


def test_a_target_with_other_files_is_left_alone(tmp_path: Path, opt: PreTrainedModel) -> None:
    save_bin_shards(opt, tmp_path / "source", halves(opt), index=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        import_checkpoint(tmp_path / "source", tmp_path / "target")
    assert [file.name for file in (tmp_path / "target").iterdir() if not file.name.startswith(".")] == ["thesis.txt"]


def test_a_target_of_another_import_is_refused(tmp_path: Path, opt: PreTrainedModel) -> None:
    save_bin_shards(opt, tmp_path / "one", halves(opt), index=True)
    other = small_opt(num_hidden_layers=2)
    save_bin_shards(other, tmp_path / "two", halves(other), index=True)
    import_checkpoint(tmp_path / "one", tmp_path / "target")
    with pytest.raises(OutputError, match="holds an import of"):
        import_checkpoint(tmp_path / "two", tmp_path / "target")


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, opt: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bin_shards(opt, tmp_path / "source", halves(opt), index=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(CapacityError, match="GB are free"):
        import_checkpoint(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors"))


def broken(tmp_path: Path, change: Any) -> FlexbatchError:
    """The error of importing a small OPT whose state dict `change` has altered."""
    model = small_opt()
    source = tmp_path / "source"
    source.mkdir()
    model.config.save_pretrained(source)
    state = dict(model.state_dict())
    change(state)
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(FlexbatchError) as caught:
        import_checkpoint(source, tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors")) if (tmp_path / "target").exists() else True
    return caught.value


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    error = broken(tmp_path, lambda state: state.pop("model.decoder.layers.1.fc1.bias"))
    assert "1 tensor of OPTForCausalLM missing: model.decoder.layers.1.fc1.bias" in str(error)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    error = broken(tmp_path, lambda state: state.update({"model.decoder.layers.7.fc1.bias": torch.zeros(3)}))
    assert "model.decoder.layers.7.fc1.bias" in str(error)
    assert "without a place" in str(error)


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    error = broken(tmp_path, lambda state: state.update({"model.decoder.layers.0.fc1.weight": torch.zeros(3, HIDDEN)}))
    assert "'model.decoder.layers.0.fc1.weight' has [3, 16]; the config asks for [48, 16]" in str(error)


def test_a_tied_tensor_that_differs_from_its_twin_is_named(tmp_path: Path) -> None:
    error = broken(tmp_path, lambda state: state.update({"lm_head.weight": torch.zeros(101, HIDDEN)}))
    assert "lm_head.weight" in str(error)
    assert "differ" in str(error)


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "restored.pt"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_holds_code_is_refused_and_does_nothing(
    tmp_path: Path, name: str, as_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    small_opt().config.save_pretrained(tmp_path / "source")
    torch.save({"model": {"a": Harmful()}}, tmp_path / "source" / name, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ModelError, match=r"refused.*system"):
        import_checkpoint(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "harmed").exists()


def test_a_numpy_file_that_holds_objects_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "opt-np"
    source.mkdir()
    with (source / "decoder.embed_tokens.weight").open("wb") as stream:
        np.save(stream, np.array([Harmful()], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match="pickled objects"):
        import_checkpoint(source, tmp_path / "target", config=small_opt().config.to_dict())


def test_truncated_files_are_named(tmp_path: Path, opt: Any) -> None:
    save_bin_shards(opt, tmp_path / "bin", halves(opt), index=True)
    cut(tmp_path / "bin" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin is truncated"):
        import_checkpoint(tmp_path / "bin", tmp_path / "target")
    save_numpy_folder(opt, tmp_path / "opt-np")
    cut(tmp_path / "opt-np" / "decoder.layers.0.fc1.weight")
    with pytest.raises(ModelError, match=r"decoder\.layers\.0\.fc1\.weight is truncated"):
        import_checkpoint(tmp_path / "opt-np", tmp_path / "target", config=opt.config.to_dict())
    (tmp_path / "metaseq").mkdir()
    torch.save({"model": metaseq_state(opt)}, tmp_path / "metaseq" / "restored.pt")
    cut(tmp_path / "metaseq" / "restored.pt")
    with pytest.raises(ModelError, match=r"restored\.pt is truncated"):
        import_checkpoint(tmp_path / "metaseq", tmp_path / "target", config=opt.config.to_dict())


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def test_a_missing_shard_is_named(tmp_path: Path, opt: Any) -> None:
    save_bin_shards(opt, tmp_path / "bin", halves(opt), index=False)
    (tmp_path / "bin" / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin is missing"):
        import_checkpoint(tmp_path / "bin", tmp_path / "target")
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in (0, 2):
        torch.save({"model": model_part(metaseq_state(opt), part, 4)}, parts / f"reshard-model_part-{part}.pt")
    with pytest.raises(ModelError, match="part 1 shard 0 is missing"):
        import_checkpoint(parts, tmp_path / "target", config=opt.config.to_dict())


def test_gguf_is_out_of_scope_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + b"\0" * 64)
    for source in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ModelError, match="GGUF is out of flexbatch's scope"):
            import_checkpoint(source, tmp_path / "target")


def test_a_folder_without_known_weights_is_told_the_known_forms(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelError, match=r"pytorch_model\*\.bin"):
        import_checkpoint(tmp_path, tmp_path / "target")


def anonymous_memory() -> int:
    """Bytes of this process that are not mapped files (those can be dropped at any time and do not count)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_is_a_few_tensors_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """127 MB of weights in shards of model parts, the largest tensor 4 MB."""
    model = small_opt(
        num_hidden_layers=10, hidden_size=512, num_attention_heads=8, ffn_dim=2048, word_embed_proj_dim=512
    )
    config = model.config.to_dict()
    total = sum(parameter.nbytes for parameter in model.parameters())
    for part in range(2):
        for number, shard in enumerate(fsdp_shards(model_part(metaseq_state(model), part, 2), 4, metadata=True)):
            torch.save(shard, tmp_path / f"checkpoint_last-model_part-{part}-shard{number}.pt")
    del model, shard
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, seen = anonymous_memory(), []
    write = importing.write_shard

    def watched(*arguments: Any) -> str:
        digest = write(*arguments)
        seen.append(anonymous_memory() - before)
        return digest

    monkeypatch.setattr(importing, "write_shard", watched)
    import_checkpoint(tmp_path, tmp_path / "target", config=config, shard_bytes=6_000_000)
    assert len(seen) > 8
    assert max(seen) < total // 3


def test_a_folder_that_holds_safetensors_needs_no_import_and_says_so(tmp_path: Path, opt: PreTrainedModel) -> None:
    opt.save_pretrained(tmp_path / "source")
    torch.save(opt.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors already.*\n.*model\.path"):
        import_checkpoint(tmp_path / "source", tmp_path / "target")
    assert_same_model(import_checkpoint(tmp_path / "source", tmp_path / "target", layout="bin"), opt)
