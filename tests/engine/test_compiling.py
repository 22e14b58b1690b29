"""Kernels are compiled by another process, so that a run has the memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexbatch.engine import compiling
from flexbatch.engine.compiling import compile_ahead
from flexbatch.plan.policy import Policy, Shares

RUN = """
import importlib, pkgutil, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from flexbatch import kernels
from flexbatch.engine.compiling import compile_ahead
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.running import answer, engine

policy = Policy(weights=Shares(0.3, 0.0), slots=5, prefill_tokens=60, compute="int8", compressed_cache=True)
compile_ahead(policy, torch.bfloat16)
place = Path(sys.argv[1])
shape = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
config = AutoConfig.for_model("llama", vocab_size=1100, **shape)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "model")
requests = [
    Request(row, tuple(range(50)) * (row < 3) + tuple(range(row, row + 70)), Sampling(max_new_tokens=40),
            shared_tokens=50 * (row < 3))
    for row in range(7)
]
done, _ = answer(engine(place / "model", policy, 160, place, dtype=torch.bfloat16), requests)
assert len(done) == 7
used = compiled = 0
for module in pkgutil.iter_modules(kernels.__path__):
    for each in vars(importlib.import_module(f"flexbatch.kernels.{module.name}")).values():
        if hasattr(each, "stats"):
            used += sum(each.stats.cache_hits.values())
            compiled += sum(each.stats.cache_misses.values())
print(used, compiled)
"""


def test_a_run_of_another_model_finds_all_its_kernels_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "code")}
    told = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    used, compiled = map(int, told.stdout.split()[-2:])
    assert used >= 8
    assert compiled == 0


def test_a_policy_is_rehearsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CODE_FOLDER", tmp_path)
    small = Policy(weights=Shares(0.5, 0.0), slots=2)
    compile_ahead(small, torch.float32)
    (mark,) = tmp_path.iterdir()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a second time would fail
    compile_ahead(Policy(weights=Shares(0.1, 0.0), slots=40), torch.float32)
    assert list(tmp_path.iterdir()) == [mark]


def test_a_run_compiles_for_itself_where_no_other_process_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "CODE_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with caplog.at_level(logging.WARNING):
        compile_ahead(Policy(), torch.float32)
    assert "The run compiles its kernels itself" in caplog.text
    assert not list(tmp_path.iterdir())
