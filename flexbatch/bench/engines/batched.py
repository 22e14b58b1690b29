"""Transformers' own `generate`, batch after batch: what Accelerate and plain Transformers have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from flexbatch.bench.engines.meter import Meter
from flexbatch.bench.trial import Outcome, Trial, digest_of, read_prompts
from flexbatch.bench.workloads import sorted_batches


class StepTimes(StoppingCriteria):
    """Never stops anything; notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002 - Transformers' signature
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_batches(model: PreTrainedModel, trial: Trial, meter: Meter) -> Outcome:
    """Every prompt's tokens, in batches of like length, padded on the left."""
    prompts = read_prompts(Path(trial.prompts), trial.rows).token_ids
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=trial.new_tokens,
        min_new_tokens=trial.new_tokens,
        do_sample=False,
        eos_token_id=model.config.get_text_config().eos_token_id,
        pad_token_id=1,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    prefill, seconds = 0.0, list[float]()
    meter.start()
    for batch in sorted_batches([len(prompt) for prompt in prompts], trial.batch):
        ids, mask = padded([prompts[row] for row in batch])
        steps, began = StepTimes(), time.perf_counter()
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, generation_config=settings, stopping_criteria=StoppingCriteriaList([steps])
            )
        prefill += steps.times[0] - began
        seconds.append(time.perf_counter() - began)
        for row, generated in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            tokens[row] = generated
    return Outcome(
        trial.engine,
        rows=len(prompts),
        batch=trial.batch,
        tokens=sum(map(len, tokens)),
        seconds=meter.seconds,
        setup_seconds=meter.setup_seconds,
        prefill_seconds=prefill,
        read_bytes=meter.read_bytes,
        processor_seconds=meter.processor_seconds,
        digest=digest_of(tokens),
        details={"batch_seconds": seconds, "dtype": str(model.dtype), "attention": model.config._attn_implementation},
    )


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, int64 `[rows, longest]`, padded on the left with token 1."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), 1, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
