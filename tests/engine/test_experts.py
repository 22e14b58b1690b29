"""Experts keep matrices of their own, however a checkpoint stores them, and give what Transformers' stacks give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from flexbatch.engine import model as building
from flexbatch.engine.checkpoint_map import map_checkpoint
from flexbatch.engine.experts import Experts, routers
from flexbatch.engine.model import build
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.packed_sources import pack_sources, smaller_form
from flexbatch.errors import ModelError
from flexbatch.memory.packing import Layout
from flexbatch.memory.safetensors_index import SafetensorsIndex, TensorEntry
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.weight_need import expanded_bytes, held_weights
from flexbatch.records import Request, Sampling
from tests.engine.families import loaded, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine
from tests.plan.examples import machine

MIXTURES = ["mixtral", "qwen3-moe", "deepseek-v3"]
LONGEST, NEW_TOKENS = 20, 5
STREAMED = Shares(0, 0)


def _experts(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def config_of(family: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(saved(family))


def stacked(family: str, folder: Path) -> Path:
    """The family's model in a folder that holds its parameters as Transformers has them: experts in stacks."""
    save_file(
        {name: value.contiguous() for name, value in loaded(family).state_dict().items()}, folder / "model.safetensors"
    )
    config_of(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MIXTURES)
def test_a_checkpoint_of_stacks_gives_the_tokens_of_one_of_matrices(family: str, tmp_path: Path) -> None:
    folder = stacked(family, tmp_path)
    assert any(
        entry.shape[:1] == (4,) and len(entry.shape) == 3 for entry in SafetensorsIndex.open(folder).entries.values()
    )
    running = engine(folder, Policy(STREAMED, slots=4), LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(prompts(5, LONGEST))))
    for index, row in enumerate(prompts(5, LONGEST)):
        assert_same_tokens(family, row, done[index].token_ids, reference(family, row, NEW_TOKENS))


@pytest.mark.parametrize("family", MIXTURES)
def test_no_parameter_is_made_of_several_stored_tensors(family: str) -> None:
    stepped = build(config_of(family), torch.float32)
    sources = map_checkpoint(stepped.model, SafetensorsIndex.open(saved(family)).entries, "here")
    assert all(source.converter is None for source in sources.values())
    assert any(isinstance(module, Experts) for module in stepped.model.modules())


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_engine_keeps_as_many_bytes_of_weights_as_the_plan_counts(
    family: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)
    config = config_of(family)
    spec, stepped = spec_from_config(config), build(config, torch.float32)
    sources = map_checkpoint(stepped.model, SafetensorsIndex.open(saved(family)).entries, "here")
    if bits < 16:
        sources = pack_sources(stepped, sources, smaller_form(bits, integers=False), tmp_path)
    held: dict[str | None, int] = {}
    for name, owner in stepped.stop_of_parameter().items():
        held[owner] = held.get(owner, 0) + sources[name].nbytes
    assert held.pop(None) == spec.small_parameters * spec.dtype_bytes
    assert sorted(held.values()) == sorted(map(sum, spec.stop_bytes(bits)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_large_layer_goes_by_expert_by_expert(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(family)
    whole = spec_from_config(config)
    monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)
    spec = spec_from_config(config)
    expert = sum(value.numel() for value in _experts(build(config, torch.float32).model)[0][0].parameters())
    rows = max(expert, config.vocab_size * config.hidden_size)
    assert held_weights(spec, Policy(STREAMED)).most == rows * spec.dtype_bytes
    by_expert, at_once = (expanded_bytes(each, machine("cpu-2core"), Policy(weight_bits=4)) for each in (spec, whole))
    assert by_expert <= at_once / 4
    assert spec.linear_flops_per_token == whole.linear_flops_per_token


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_never_packed(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    stepped = build(config, torch.float32)
    found = routers(stepped.model)
    assert len(found) == len(_experts(stepped.model)) > 1
    sources = map_checkpoint(stepped.model, SafetensorsIndex.open(saved(family)).entries, "here")
    asked: list[nn.Module] = []

    def form(entry: TensorEntry, module: nn.Module) -> Layout | None:
        asked.append(module)
        return smaller_form(4, integers=False)(entry, module)

    pack_sources(stepped, sources, form, tmp_path)
    assert all(expert.down_proj in asked for experts in _experts(stepped.model) for expert in experts)
    assert not any(router in asked for router in found)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_s_sums_are_those_of_transformers_whatever_tokens_are_beside_it(family: str) -> None:
    torch.manual_seed(0)
    theirs = next(module for module in loaded(family).modules() if hasattr(module, "gate_up_proj"))
    ours = _experts(build(config_of(family), torch.float32).model)[0]
    for number, expert in enumerate(ours):
        gate, up = theirs.gate_up_proj[number].chunk(2)
        for layer, weight in (
            (expert.gate_proj, gate),
            (expert.up_proj, up),
            (expert.down_proj, theirs.down_proj[number]),
        ):
            layer.weight = nn.Parameter(weight, requires_grad=False)
    tokens = torch.randn(9, 64)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in tokens])
    share = torch.rand(9, 2)
    with torch.inference_mode():
        made = ours(tokens, chosen, share)
        torch.testing.assert_close(made, theirs(tokens, chosen, share), rtol=1e-5, atol=1e-5)
        alone = torch.cat(
            [ours(tokens[row : row + 1], chosen[row : row + 1], share[row : row + 1]) for row in range(9)]
        )
    torch.testing.assert_close(made, alone, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_with_more_experts_than_its_config_is_refused(tmp_path: Path) -> None:
    config = config_of("mixtral")
    config.num_local_experts = 3
    model = build(config, torch.float32).model
    for folder in (saved("mixtral"), stacked("mixtral", tmp_path)):
        with pytest.raises(ModelError, match=r"have no place|are missing"):
            map_checkpoint(model, SafetensorsIndex.open(folder).entries, "here")
