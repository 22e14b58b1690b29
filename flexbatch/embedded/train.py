"""Trains `opt-tiny` from nothing: `python -m flexbatch.embedded.train --output DIR`.

The same seed with the same library versions draws the same data in the same order. Two cores are enough.
"""

from __future__ import annotations

import argparse
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional
from transformers import OPTForCausalLM, PreTrainedTokenizerBase

from flexbatch.embedded.architecture import Plan, build_model
from flexbatch.embedded.batches import Batch, batches, encode, pad
from flexbatch.embedded.score import scores
from flexbatch.embedded.tasks import EVALUATED, TASKS, Task, evaluation_examples
from flexbatch.embedded.tokenizer import save_tokenizer, train_tokenizer, word_numbers


def gradients(model: OPTForCausalLM, batch: Batch, total: float) -> tuple[float, tuple[torch.Tensor, ...]]:
    """The weighted loss over `total` and its gradients, one for each parameter. Touches no state of the model."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(batch.tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[batch.counted])
    losses = functional.cross_entropy(logits.float(), batch.tokens[:, 1:][batch.counted], reduction="none")
    loss = (losses * batch.weights[batch.counted]).sum() / total
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def optimizers(model: OPTForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (Jordan et al., 2024), AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(plan: Plan, step: int) -> float:
    """Warm-up, then constant, then linear decay to zero over the last steps."""
    return min(1.0, (step + 1) / plan.warmup, (plan.steps - step) / plan.decay_steps)


@torch.inference_mode()
def forced_score(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """The share of held-out answers of which every token is the model's first choice: what greedy decoding would
    score, from one forward pass."""
    examples = evaluation_examples(task, 48, 2, 1)
    encoded = [encode(tokenizer, example, 1.0, 0.0).tokens[:-1] for example in examples]
    lengths = [len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]) for example in examples]
    longest = max(map(len, encoded))
    best = model(torch.tensor([ids + [1] * (longest - len(ids)) for ids in encoded]), use_cache=False).logits.argmax(-1)
    right = 0
    for ids, length, row in zip(encoded, lengths, best.tolist(), strict=True):
        right += row[len(ids) - length - 1 : len(ids) - 1] == ids[-length:]
    return right / len(examples)


def save_state(
    path: Path, step: int, model: OPTForCausalLM, engines: list[torch.optim.Optimizer], generator: torch.Generator
) -> None:
    """Everything that the next step depends on, so that an interrupted training goes on as if it had not been."""
    partial = path.with_suffix(".partial")
    states = [engine.state_dict() for engine in engines]
    torch.save({"step": step, "model": model.state_dict(), "engines": states, "random": generator.get_state()}, partial)
    partial.replace(path)


def load_state(
    path: Path, model: OPTForCausalLM, engines: list[torch.optim.Optimizer], generator: torch.Generator
) -> int:
    """Restores what `save_state` kept and returns the step to go on with."""
    kept = torch.load(path, weights_only=True)
    model.load_state_dict(kept["model"])
    for engine, state in zip(engines, kept["engines"], strict=True):
        engine.load_state_dict(state)
    generator.set_state(kept["random"])
    return int(kept["step"])


def train(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    log_every: int,
    threads: int,
    output: Path,
    state: Path | None,
) -> OPTForCausalLM:
    """Runs the plan; prints the loss and, now and then, scores, and saves what it has.

    The micro-batches of a step are shared out among `threads` and their gradients added in order, so that the sum does
    not depend on who was first. One thread for each micro-batch beats many for each product at this size.
    """
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    model = build_model(plan, word_numbers(tokenizer))
    parameters = list(model.parameters())
    engines = optimizers(model, plan)
    rates = [group["lr"] for engine in engines for group in engine.param_groups]
    first = load_state(state, model, engines, generator) if state and state.exists() else 0
    groups = [group for engine in engines for group in engine.param_groups]
    started, seen, running = time.monotonic(), 0, 0.0
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step, parts in enumerate(batches(plan, tokenizer)):
            if step < first:
                continue
            total = sum(sum(s.weights) for part in parts for s in part)
            padded = [pad(part, plan, generator) for part in parts]
            results = list(pool.map(lambda batch, total=total: gradients(model, batch, total), padded))
            for parameter, *parts_of_gradient in zip(parameters, *(found for _, found in results), strict=True):
                parameter.grad = functools.reduce(torch.add, parts_of_gradient)
            running += sum(loss for loss, _ in results)
            seen += sum(batch.tokens.numel() for batch in padded)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for rate, group in zip(rates, groups, strict=True):
                group["lr"] = rate * schedule(plan, step)
            for engine in engines:
                engine.step()
            if (step + 1) % log_every == 0:
                elapsed = time.monotonic() - started
                print(f"step {step + 1} loss {running / log_every:.4f} tokens {seen} seconds {elapsed:.0f}", flush=True)
                running = 0.0
            if (step + 1) % (5 * log_every) == 0:
                print({name: round(forced_score(model, tokenizer, TASKS[name]), 2) for name in TASKS}, flush=True)
                model.save_pretrained(output)
                if state:
                    save_state(state, step + 1, model, engines, generator)
    return model


def main() -> None:
    """The documented training command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--state", type=Path, help="a file that keeps the training's state, to go on after a break")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    output, threads, log_every = options.pop("output"), options.pop("threads"), options.pop("log_every")
    state = options.pop("state")
    torch.set_num_threads(1)
    plan = Plan(**options)
    tokenizer = train_tokenizer(plan.seed)
    save_tokenizer(tokenizer, output)
    model = train(plan, tokenizer, log_every, threads, output, state)
    model.save_pretrained(output)
    for name in EVALUATED:
        print(name, scores(model, tokenizer, TASKS[name], 100, 5), flush=True)


if __name__ == "__main__":
    main()
