"""Hugging Face Accelerate: decoder layers on disk, read from the safetensors files in place (its faster path)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flexbatch.bench.engines.batched import generate_batches
from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Trial
from flexbatch.checkpoint.architecture import layer_prefixes, skeleton


def run(trial: Trial) -> Outcome:
    meter = Meter()
    empty = skeleton(AutoConfig.from_pretrained(trial.model))
    places = dict(place_modules(empty, {prefix.rstrip(".") for prefix in layer_prefixes(empty)}))
    model = AutoModelForCausalLM.from_pretrained(
        trial.model, dtype=getattr(torch, trial.dtype), device_map=places, offload_folder=trial.scratch
    )
    return generate_batches(model, trial, meter)


def place_modules(module: nn.Module, layers: set[str], path: str = "") -> Iterator[tuple[str, str]]:
    """`disk` for every decoder layer, `cpu` for what lies between them (embeddings, final norm, head)."""
    for name, child in module.named_children():
        full = f"{path}{name}"
        if full in layers:
            yield full, "disk"
        elif any(layer.startswith(f"{full}.") for layer in layers):
            yield from place_modules(child, layers, f"{full}.")
        else:
            yield full, "cpu"
