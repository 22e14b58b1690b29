"""Plain Transformers with the whole model in memory."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from flexbatch.bench.engines.batched import generate_batches
from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Trial


def run(trial: Trial) -> Outcome:
    meter = Meter()
    model = AutoModelForCausalLM.from_pretrained(trial.model, dtype=getattr(torch, trial.dtype))
    return generate_batches(model, trial, meter)
