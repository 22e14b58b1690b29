"""The benchmark's prompts: token ids, the same for every engine and on every machine."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from flexbatch.bench.trial import Prompts
from flexbatch.config import BenchConfig
from flexbatch.errors import ConfigError

FIRST_TOKEN = 5  # smaller ids are special tokens in many vocabularies
SEED = 20260101
REPOSITORY = Path(__file__).resolve().parents[2]


def make_prompts(bench: BenchConfig, vocabulary: int) -> Prompts:
    """The prompts of `bench.workload` for a vocabulary of this many tokens."""
    if bench.workload == "fewshot":
        return fewshot(bench.rows, bench.prompt_tokens, bench.shared_tokens, vocabulary)
    if bench.workload == "mixed":
        lengths, note = mixed_lengths(bench.rows, bench.prompt_tokens)
        return Prompts(tuple(_tokens(length, vocabulary, row) for row, length in enumerate(lengths)), note=note)
    return random_prompts(bench.rows, bench.prompt_tokens, vocabulary)


def random_prompts(rows: int, tokens: int, vocabulary: int) -> Prompts:
    """No two prompts share a prefix, none is shorter than another."""
    return Prompts(tuple(_tokens(tokens, vocabulary, row) for row in range(rows)))


def fewshot(rows: int, tokens: int, shared: int, vocabulary: int) -> Prompts:
    """The first `shared` tokens are the same for all, as the examples of a few-shot prompt are."""
    if not 0 <= shared < tokens:
        raise ConfigError(
            f"bench.shared_tokens={shared} is not below bench.prompt_tokens={tokens}.",
            remedy="Leave every prompt at least one token of its own.",
        )
    common = _tokens(shared, vocabulary, -1)
    own = (_tokens(tokens - shared, vocabulary, row) for row in range(rows))
    return Prompts(tuple(common + tail for tail in own), shared_tokens=shared)


def mixed_lengths(rows: int, longest: int) -> tuple[list[int], str]:
    """Lengths of real reviews in tokens, cut at `longest`, or made-up ones; and which of the two."""
    real = _review_lengths(rows)
    if real:
        lengths = [min(length, longest) for length in (real * (rows // len(real) + 1))[:rows]]
        cut = sum(length >= longest for length in lengths)
        return lengths, f"lengths of movie reviews, mean {sum(lengths) / rows:.0f}, {cut} of {rows} cut at {longest}"
    chooser = random.Random(SEED)
    lengths = [max(8, min(longest, round(chooser.lognormvariate(5.3, 0.7)))) for _ in range(rows)]
    return lengths, f"made-up lengths (log-normal, no real data here), mean {sum(lengths) / rows:.0f}"


def _review_lengths(rows: int) -> list[int]:
    """Tokens of the first reviews of the real data folder, by OPT's tokenizer; nothing where either is missing."""
    named = os.environ.get("FLEXBATCH_REALDATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "realdata"
    reviews, tokenizer = folder / "movie_reviews" / "reviews.jsonl", folder / "opt-tokenizer" / "tokenizer.json"
    if not (reviews.is_file() and tokenizer.is_file()):
        return []
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    with reviews.open(encoding="utf-8") as stream:
        return [len(encoder.encode(json.loads(line)["text"]).ids) for line, _ in zip(stream, range(rows), strict=False)]


def _tokens(count: int, vocabulary: int, stream: int) -> tuple[int, ...]:
    chooser = random.Random(f"{SEED}/{stream}")
    return tuple(chooser.randrange(FIRST_TOKEN, vocabulary) for _ in range(count))


def computed_prompt_tokens(prompts: Prompts, *, sharing: bool) -> int:
    """Prompt tokens that must go through the model: a shared prefix once where the engine shares it."""
    if not sharing or not prompts.shared_tokens:
        return sum(prompts.lengths)
    return prompts.shared_tokens + sum(length - prompts.shared_tokens for length in prompts.lengths)


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of like length, longest first: what a careful user of a batching engine does."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]
