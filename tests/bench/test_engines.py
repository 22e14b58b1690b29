"""What all engines are asked to do is the same, and in float32 they answer the same."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flexbatch.bench.engines import accelerate_disk, ctranslate2_memory, machine_limits, streaming, transformers_memory
from flexbatch.bench.engines.checkpoint_maker import make_checkpoint
from flexbatch.bench.roofline import MachineLimits
from flexbatch.bench.trial import Outcome, Prompts
from flexbatch.bench.workloads import fewshot, random_prompts
from flexbatch.config import OffloadConfig
from tests.bench.support import FIELDS, VOCABULARY, tiny_checkpoint, tiny_trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return random_prompts(6, 20, VOCABULARY)


@pytest.fixture(scope="module")
def reference(folder: Path, prompts: Prompts) -> Outcome:
    return transformers_memory.run(tiny_trial(folder, "transformers", prompts))


def test_every_prompt_gets_exactly_the_tokens_asked_for(reference: Outcome) -> None:
    assert reference.tokens == 6 * 6
    assert reference.seconds > 0
    assert 0 < (reference.prefill_seconds or 0) < reference.seconds


def test_accelerate_from_disk_generates_the_same_tokens(folder: Path, prompts: Prompts, reference: Outcome) -> None:
    outcome = accelerate_disk.run(tiny_trial(folder, "accelerate", prompts))
    assert (outcome.tokens, outcome.digest) == (reference.tokens, reference.digest)


@pytest.mark.parametrize("percent", [[100, 0, 100, 0, 100, 0], [0, 0, 100, 0, 100, 0]])
def test_flexbatch_generates_the_same_tokens(
    folder: Path, prompts: Prompts, reference: Outcome, percent: list[float]
) -> None:
    offload = asdict(OffloadConfig(policy="manual", percent=percent, slots=4))
    trial = tiny_trial(folder, "flexbatch", prompts)
    outcome = streaming.run(tiny_trial(folder, "flexbatch", prompts, options={**trial.options, "offload": offload}))
    assert (outcome.tokens, outcome.digest) == (reference.tokens, reference.digest)
    assert bool(outcome.details["passes"]["bytes_moved"].get("disk>device")) == (percent[0] == 0)


@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="CTranslate2 is not installed")
def test_ctranslate2_generates_the_same_tokens(folder: Path, prompts: Prompts, reference: Outcome) -> None:
    trial = tiny_trial(folder, "ctranslate2", prompts)
    ctranslate2_memory.convert(trial)
    outcome = ctranslate2_memory.run(trial)
    assert (outcome.tokens, outcome.digest) == (reference.tokens, reference.digest)


def test_a_shared_prefix_is_computed_once_and_changes_no_token(folder: Path) -> None:
    prompts = fewshot(6, 24, 18, VOCABULARY)
    want = transformers_memory.run(tiny_trial(folder, "transformers", prompts))
    got = streaming.run(tiny_trial(folder, "flexbatch", prompts))
    assert got.digest == want.digest
    assert got.details["passes"]["prefill_tokens"] == 18 + 6 * 6


def test_layers_go_to_disk_and_the_rest_stays(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(folder))
    places = dict(accelerate_disk.place_modules(model, {f"model.decoder.layers.{number}" for number in range(4)}))
    assert [name for name, place in places.items() if place == "disk"] == [
        f"model.decoder.layers.{number}" for number in range(4)
    ]
    assert places["lm_head"] == places["model.decoder.embed_tokens"] == "cpu"


def test_an_interrupted_checkpoint_is_finished_with_the_same_values(tmp_path: Path) -> None:
    import torch

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    make_checkpoint(whole, FIELDS, torch.float32)
    make_checkpoint(torn, FIELDS, torch.float32)
    (torn / "config.json").unlink()
    (torn / "model.safetensors").unlink()
    make_checkpoint(torn, FIELDS, torch.float32)
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_machines_limits_are_measured_at_the_models_shapes(folder: Path, prompts: Prompts) -> None:
    outcome = machine_limits.run(tiny_trial(folder, "roofline", prompts))
    limits = MachineLimits.from_details(outcome.details)
    assert set(limits.gemm) == set(machine_limits.ROWS)
    assert min(*limits.gemm.values(), limits.disk_read, limits.memory_copy) > 0
    assert limits.linear_flops == 2 * 4 * (4 * 64 * 64 + 2 * 64 * 128)
