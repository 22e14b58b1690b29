"""Training examples as padded micro-batches of tokens with their weights in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from flexbatch.embedded.architecture import POSITIONS, Plan
from flexbatch.embedded.tasks import TASKS, Example, training_example


@dataclass(frozen=True, slots=True)
class Weighted:
    """One prompt in tokens and the weight of each token in the loss."""

    tokens: list[int]
    weights: list[float]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, answer_weight: float, text_weight: float) -> Weighted:
    """The example with its opening and closing `</s>`; answers weigh more than the text between them."""
    encoded = tokenizer([text for text, _ in example.pieces], add_special_tokens=False)["input_ids"]
    tokens, weights = [tokenizer.bos_token_id], [0.0]
    for ids, (_, is_answer) in zip(encoded, example.pieces, strict=True):
        tokens += ids
        weights += [answer_weight if is_answer else text_weight] * len(ids)
    return Weighted([*tokens, tokenizer.eos_token_id], [*weights, answer_weight])


def batches(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[Weighted]]]:
    """For each step its micro-batches, each of sequences of about one length. Short prompts come first."""
    rng = Random(f"train-{plan.seed}")
    tasks = list(TASKS.values())
    for step in range(plan.steps):
        weights = [task.weight + (task.first_weight if step < plan.first_steps else 0.0) for task in tasks]
        drawn: list[Weighted] = []
        size = 0
        while size < plan.tokens_per_step:
            task = rng.choices(tasks, weights)[0]
            most = 1 if step < plan.short_steps else rng.choice((1, 3, 5, 5, 9))
            example = training_example(rng, task, most)
            sequence = encode(tokenizer, example, task.answer_weight, plan.text_weight)
            if len(sequence.tokens) <= POSITIONS:
                drawn.append(sequence)
                size += len(sequence.tokens)
        drawn.sort(key=lambda sequence: len(sequence.tokens))
        yield list(cut(drawn, plan.tokens_per_step // 4))


def cut(sequences: Sequence[Weighted], limit: int) -> Iterator[list[Weighted]]:
    """Runs of neighbours of about one length whose padded size stays within `limit` tokens."""
    run: list[Weighted] = []
    for sequence in sequences:
        length = len(sequence.tokens)
        if run and ((len(run) + 1) * length > limit or length > 1.3 * len(run[0].tokens) + 8):
            yield run
            run = []
        run.append(sequence)
    yield run


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded micro-batch: token ids int64 (rows, columns), and of the targets `tokens[:, 1:]` those that count
    (bool) with their weights (float32)."""

    tokens: torch.Tensor
    counted: torch.Tensor
    weights: torch.Tensor


def pad(sequences: Sequence[Weighted], plan: Plan, generator: torch.Generator) -> Batch:
    """Pads on the right. Every answer token counts; of the text between answers a random share is enough."""
    longest = max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.tensor([s.tokens + [1] * (longest - len(s.tokens)) for s in sequences])
    weights = torch.tensor([s.weights + [0.0] * (longest - len(s.weights)) for s in sequences])[:, 1:]
    sampled = torch.rand(weights.shape, generator=generator) < plan.text_share
    return Batch(tokens, (weights > plan.text_weight) | ((weights > 0) & sampled), weights)
