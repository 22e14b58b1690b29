"""Trains `opt-tiny` from nothing: `python -m flexbatch.embedded.train --output DIR`.

The same seed on the same machine and library versions gives the same data, in the same order. Two threads are enough.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from flexbatch.embedded.score import scores
from flexbatch.embedded.tasks import EVALUATED, TASKS, Example, training_example
from flexbatch.embedded.tokenizer import train_tokenizer

POSITIONS = 640
"""Prompts of 512 tokens and 64 new ones fit, with room to spare."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The training run. `tokens_per_step` counts padded tokens; rates are the peaks of the schedule."""

    seed: int = 0
    steps: int = 5000
    tokens_per_step: int = 2048
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    matrix_rate: float = 0.01
    rate: float = 2e-3
    warmup: int = 100
    short_share: float = 0.4
    text_weight: float = 0.1
    text_share: float = 0.15


def build_model(plan: Plan, vocabulary: int) -> OPTForCausalLM:
    """A fresh OPT whose learned positions start as sinusoids, so that the step from one position to the next is the
    same everywhere from the start (Vaswani et al., 2017, section 3.5)."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=plan.hidden_size,
        word_embed_proj_dim=plan.hidden_size,
        ffn_dim=4 * plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config)
    # For sequences this short the plain product of queries and keys trains faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    table = model.model.decoder.embed_positions.weight
    place = torch.arange(table.shape[0]).unsqueeze(1)
    rate = torch.exp(torch.arange(0, plan.hidden_size, 2) * (-math.log(2000.0) / plan.hidden_size))
    with torch.no_grad():
        table[:, 0::2] = 0.05 * torch.sin(place * rate)
        table[:, 1::2] = 0.05 * torch.cos(place * rate)
    return model


@dataclass(frozen=True, slots=True)
class Sequence_:
    """One prompt in tokens and the weight of each token in the loss."""

    tokens: list[int]
    weights: list[float]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, answer_weight: float, text_weight: float) -> Sequence_:
    """The example with its opening and closing `</s>`; answers weigh more than the text between them."""
    encoded = tokenizer([text for text, _ in example.pieces], add_special_tokens=False)["input_ids"]
    tokens, weights = [tokenizer.bos_token_id], [0.0]
    for ids, (_, is_answer) in zip(encoded, example.pieces, strict=True):
        tokens += ids
        weights += [answer_weight if is_answer else text_weight] * len(ids)
    return Sequence_([*tokens, tokenizer.eos_token_id], [*weights, answer_weight])


def batches(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[Sequence_]]]:
    """For each step its micro-batches, each of sequences of about one length. Short prompts come first."""
    rng = Random(f"train-{plan.seed}")
    tasks = list(TASKS.values())
    for step in range(plan.steps):
        progress = step / plan.steps
        drawn: list[Sequence_] = []
        size = 0
        while size < plan.tokens_per_step:
            task = rng.choices(tasks, [task.weight for task in tasks])[0]
            most = 1 if progress < plan.short_share else rng.choice((1, 3, 5, 5, 9))
            example = training_example(rng, task, most)
            sequence = encode(tokenizer, example, task.answer_weight, plan.text_weight)
            if len(sequence.tokens) <= POSITIONS:
                drawn.append(sequence)
                size += len(sequence.tokens)
        drawn.sort(key=lambda sequence: len(sequence.tokens))
        yield list(cut(drawn, plan.tokens_per_step // 2))


def cut(sequences: Sequence[Sequence_], limit: int) -> Iterator[list[Sequence_]]:
    """Runs of neighbours whose padded size stays within `limit` tokens."""
    run: list[Sequence_] = []
    for sequence in sequences:
        if run and (len(run) + 1) * len(sequence.tokens) > limit:
            yield run
            run = []
        run.append(sequence)
    yield run


def batch_loss(model: OPTForCausalLM, batch: Sequence[Sequence_], generator: torch.Generator, plan: Plan) -> torch.Tensor:
    """The weighted sum of the losses; of the tokens outside answers a random share is enough."""
    longest = max(len(sequence.tokens) for sequence in batch)
    tokens = torch.tensor([s.tokens + [1] * (longest - len(s.tokens)) for s in batch])
    weights = torch.tensor([s.weights + [0.0] * (longest - len(s.weights)) for s in batch])[:, 1:]
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
    chosen = (weights > plan.text_weight) | ((weights > 0) & (torch.rand(weights.shape, generator=generator) < plan.text_share))
    logits = model.lm_head(hidden[chosen])
    losses = functional.cross_entropy(logits.float(), tokens[:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum()


def optimizers(model: OPTForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (Jordan et al., 2024), AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(plan: Plan, step: int) -> float:
    """Warm-up, then constant, then linear decay to zero over the last third."""
    return min(1.0, (step + 1) / plan.warmup, max(0.0, (plan.steps - step) / (plan.steps / 3)))


def train(plan: Plan, tokenizer: PreTrainedTokenizerBase, log_every: int) -> OPTForCausalLM:
    """Runs the plan; prints the loss and, now and then, the scores."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    model = build_model(plan, len(tokenizer))
    engines = optimizers(model, plan)
    rates = [group["lr"] for engine in engines for group in engine.param_groups]
    started, seen, running = time.monotonic(), 0, 0.0
    for step, parts in enumerate(batches(plan, tokenizer)):
        total = sum(sum(s.weights) for part in parts for s in part)
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = batch_loss(model, part, generator, plan) / total
            loss.backward()
            running += loss.item()
            seen += len(part) * len(part[-1].tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rate, group in zip(rates, (g for e in engines for g in e.param_groups), strict=True):
            group["lr"] = rate * schedule(plan, step)
        for engine in engines:
            engine.step()
            engine.zero_grad()
        if (step + 1) % log_every == 0:
            elapsed = time.monotonic() - started
            print(f"step {step + 1} loss {running / log_every:.4f} tokens {seen} seconds {elapsed:.0f}", flush=True)
            running = 0.0
        if (step + 1) % (5 * log_every) == 0:
            model.eval()
            print({name: round(scores(model, tokenizer, TASKS[name], 32, 2), 2) for name in TASKS if name != "story"}, flush=True)
            model.train()
    return model.eval()


def main() -> None:
    """The documented training command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    output, threads, log_every = options.pop("output"), options.pop("threads"), options.pop("log_every")
    torch.set_num_threads(threads)
    plan = Plan(**options)
    tokenizer = train_tokenizer(plan.seed)
    model = train(plan, tokenizer, log_every)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name in EVALUATED:
        print(name, scores(model, tokenizer, TASKS[name], 100, 5), flush=True)


if __name__ == "__main__":
    main()
