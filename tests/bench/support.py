"""A tiny random checkpoint and trials on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexbatch.bench.engines.checkpoint_maker import make_checkpoint
from flexbatch.bench.trial import Prompts, Trial, write_prompts
from flexbatch.config import HardwareConfig, OffloadConfig

VOCABULARY = 1104
FIELDS: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def tiny_checkpoint(folder: Path) -> Path:
    """Its weights are spread wider than usual, so that greedy choices are clear."""
    made = folder / "tiny"
    make_checkpoint(made, FIELDS, torch.float32, deviation=0.2)
    return made


def tiny_trial(folder: Path, engine: str, prompts: Prompts, **changes: Any) -> Trial:
    file = folder / "prompts.json"
    write_prompts(file, prompts)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    fields: dict[str, Any] = {
        "engine": engine,
        "model": str(tiny_checkpoint(folder)),
        "prompts": str(file),
        "rows": len(prompts.token_ids),
        "new_tokens": 6,
        "dtype": "float32",
        "scratch": str(scratch),
        "cache_dir": str(folder),
        "batch": 4,
        "options": {"offload": asdict(OffloadConfig()), "hardware": asdict(HardwareConfig(name="auto"))},
    }
    return Trial(**{**fields, **changes})
