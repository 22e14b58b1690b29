"""Weights that are kept compressed change no bit of what a job writes, wherever they are."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexbatch.engine import model as building
from flexbatch.engine import opening
from flexbatch.engine.checkpoint_map import map_checkpoint
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.linear_layers import use_fastest_linears
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.opening import Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.engine.packed_parameter import CompressedSource
from flexbatch.engine.packed_sources import compress_sources
from flexbatch.memory.compressed_weight import compressed_share
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import VOCABULARY, prompts
from tests.engine.running import NumberDecoder, answer

NEW_TOKENS, LONGEST = 12, 20
RESIDENT, MIXED, STREAMED = Shares(1, 0), Shares(0.4, 0.3), Shares(0, 0)
_WIDE = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**_WIDE, "ffn_dim": 700, "word_embed_proj_dim": 256, "max_position_embeddings": 256}),
    "llama": ("llama", {**_WIDE, "intermediate_size": 700, "num_key_value_heads": 2}),
    "mixtral": (
        "mixtral",
        {**_WIDE, "intermediate_size": 512, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon": ("falcon", {**_WIDE, "new_decoder_architecture": False}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}
"""With matrices that are large enough to be compressed; GPT-2 has them in layers of its own kind."""


_FOLDER = TemporaryDirectory(prefix="wide-")


@cache
def wide(family: str) -> Path:
    kind, fields = WIDE[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.bfloat16)
    folder = Path(_FOLDER.name) / family
    model.save_pretrained(folder)
    return folder


def completions(family: str, policy: Policy, folder: Path) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
    model = wide(family)
    running = open_engine(
        Checkpoint(AutoConfig.from_pretrained(model), SafetensorsIndex.open(model).entries, str(model)),
        policy,
        Limits(disk_folder=folder),
        Vocabulary(NumberDecoder(), frozenset({2})),
        EngineOptions(LONGEST + NEW_TOKENS, torch.bfloat16, reader="buffered", packed_folder=folder / "packed"),
    )
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    done: dict[int, Completion]
    done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(prompts(7, LONGEST))))
    return {index: (each.token_ids, each.logprobs) for index, each in done.items()}


@pytest.mark.parametrize("divided", [False, True], ids=["layers", "matrices"])
@pytest.mark.parametrize("family", WIDE)
def test_tokens_and_log_probabilities_are_those_of_plain_weights(
    family: str, divided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if divided:
        monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)
    plain = completions(family, Policy(RESIDENT, slots=5, prefill_tokens=40), tmp_path)  # laid out as they are
    for shares in (RESIDENT, MIXED, STREAMED):
        policy = Policy(shares, slots=5, prefill_tokens=40, compressed=True)
        assert completions(family, policy, tmp_path) == plain
    stored = SafetensorsIndex.open(wide(family)).entries
    share = compressed_share(list(stored.values()), tmp_path / "packed")
    assert share is not None  # the plan of the next job finds it
    assert 0.7 < share < 0.85


def test_a_layer_that_its_model_keeps_in_float32_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    config = AutoConfig.for_model("llama", **WIDE["llama"][1])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    real = opening.build

    def build(config: PreTrainedConfig, dtype: torch.dtype) -> SteppedModel:
        stepped = real(config, dtype)
        stepped.model.get_submodule("model.layers.1.mlp.down_proj").float()
        return stepped

    monkeypatch.setattr(opening, "build", build)
    stepped = opening.build(AutoConfig.from_pretrained(folder), torch.bfloat16)
    use_fastest_linears(stepped, torch.bfloat16, torch.device("cpu"))
    stored = SafetensorsIndex.open(folder).entries
    sources = compress_sources(stepped, map_checkpoint(stepped.model, stored, "here"), tmp_path / "packed")
    compressed = {name for name, source in sources.items() if isinstance(source, CompressedSource)}
    assert "model.layers.0.mlp.down_proj.weight" in compressed
    assert "model.layers.1.mlp.down_proj.weight" not in compressed
    assert type(stepped.model.get_submodule("model.layers.1.mlp.down_proj")) is nn.Linear


def test_what_is_read_twice_is_told_as_one_progress(tmp_path: Path) -> None:
    folder = wide("llama")
    stored = SafetensorsIndex.open(folder).entries
    told: list[float] = []
    for packed in (tmp_path / "packed", tmp_path / "packed"):
        stepped = opening.build(AutoConfig.from_pretrained(folder), torch.bfloat16)
        use_fastest_linears(stepped, torch.bfloat16, torch.device("cpu"))
        sources = map_checkpoint(stepped.model, stored, "here")
        compress_sources(stepped, sources, packed, lambda done, total: told.append(done / total))
    assert told == sorted(told)
    assert told.count(1.0) == 1
    assert told[-1] == 1.0


def test_a_torn_copy_is_made_anew(tmp_path: Path) -> None:
    policy = Policy(STREAMED, slots=5, prefill_tokens=40, compressed=True)
    first = completions("opt", policy, tmp_path)
    (file,) = (tmp_path / "packed").glob("packed-*.safetensors")
    whole = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(whole // 2)
    assert completions("opt", policy, tmp_path) == first
    assert file.stat().st_size == whole
