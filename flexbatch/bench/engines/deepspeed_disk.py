"""DeepSpeed ZeRO-3 with parameters on NVMe, driving Transformers' `generate`."""

from __future__ import annotations

import importlib.util

import torch
from transformers import AutoModelForCausalLM

from flexbatch.bench.engines.batched import generate_batches
from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Trial
from flexbatch.errors import EngineError


def run(trial: Trial) -> Outcome:
    if importlib.util.find_spec("deepspeed") is None:
        raise EngineError("not run: DeepSpeed is not installed here.")
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    meter = Meter()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": trial.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": trial.scratch, "pin_memory": False},
        },
    }
    kept = HfDeepSpeedConfig(config)  # type: ignore[no-untyped-call]  # Transformers then loads shard by shard straight into DeepSpeed's partitions.
    model = AutoModelForCausalLM.from_pretrained(trial.model, dtype=getattr(torch, trial.dtype))
    engine = deepspeed.initialize(model=model, config_params=config)[0]
    engine.module.eval()
    del kept
    return generate_batches(engine.module, trial, meter)
