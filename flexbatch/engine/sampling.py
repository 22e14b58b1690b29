"""Choosing the next token of each row from its logits.

Sampling draws one uniform number per (seed, step) from a counter-based generator and inverts the cumulative
distribution, so that a row's result depends neither on its batch nor on how often the run was resumed. Filters are
applied in Transformers' order: temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexbatch.records import Sampling


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of the probability of each of `tokens` `[rows]`. `logits` float32 `[rows, vocabulary]`."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return chosen - logits.logsumexp(-1)


def choose(logits: torch.Tensor, rows: Sequence[Sampling], steps: Sequence[int]) -> torch.Tensor:
    """A token for each row: int64 `[rows]`. `logits` float32 `[rows, vocabulary]`; `steps[i]` tokens came before."""
    tokens = logits.argmax(-1)
    for index, (sampling, step) in enumerate(zip(rows, steps, strict=True)):
        if sampling.temperature > 0:
            tokens[index] = sample(logits[index], sampling, step)
    return tokens


def sample(logits: torch.Tensor, sampling: Sampling, step: int) -> int:
    """One token drawn from float32 `logits` `[vocabulary]` under temperature, top-k and top-p."""
    scores, order = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k > 0:
        scores = scores[: sampling.top_k]
    probabilities = scores.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1.0:
        # The smallest set whose mass reaches top_p: a token stays if the mass before it is still below.
        kept = int((cumulative - probabilities < sampling.top_p).sum())
        cumulative = cumulative[: max(1, kept)]
    drawn = uniform(sampling.seed, step) * float(cumulative[-1])
    return int(order[min(int(torch.searchsorted(cumulative, drawn, right=True)), len(cumulative) - 1)])


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) of this seed and step (Philox, counter-based)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=step)).random())
