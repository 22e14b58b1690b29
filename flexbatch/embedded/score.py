"""Scores a model on held-out instances through plain Transformers: the reference that the engine must reach."""

from __future__ import annotations

from typing import Any

import torch
from transformers import OPTForCausalLM, PreTrainedTokenizerBase

from flexbatch.embedded.tasks import Task, evaluation_examples

EVALUATION_SEED = 7


def complete(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy completions, left-padded, cut at the first newline that follows text."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    engine: Any = model
    with torch.inference_mode():
        tokens = engine.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
    completions = tokenizer.batch_decode(tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [completion.split("\n")[0].strip() for completion in completions]


def scores(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, count: int, shots: int, batch: int = 32
) -> float:
    """The share of `count` held-out instances whose greedy completion is the answer, each after `shots` examples."""
    examples = evaluation_examples(task, count, shots, EVALUATION_SEED)
    right = 0
    for start in range(0, count, batch):
        part = examples[start : start + batch]
        completions = complete(model, tokenizer, [example.prompt for example in part], 48)
        right += sum(c == example.answer.strip() for c, example in zip(completions, part, strict=True))
    return right / count
