"""An output row of an evaluation, read back: the text, and the probability of just the tokens that make it up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.evaluation.fitting import Tokenizer


@dataclass(frozen=True, slots=True)
class Answer:
    """`token_ids` and `logprobs` are those of `text`: without end token and stop string. `row` orders the requests."""

    row: int
    scenario: str
    trial: int
    instance: str
    split: str
    input: str
    prompt: str
    references: tuple[str, ...]
    correct: tuple[bool, ...]
    reference_index: int
    mode: str
    completion_index: int
    shots: int
    truncated: bool
    prompt_tokens: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    error: str

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of `text`. An answer that failed is the least likely of all."""
        return -math.inf if self.error else sum(self.logprobs)

    @property
    def probability(self) -> float:
        return math.exp(min(0.0, self.logprob))

    @property
    def tokens(self) -> int:
        return len(self.logprobs)

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def read_answer(row: Mapping[str, Any], tokenizer: Tokenizer, *, generated: bool) -> Answer:
    """`row` maps the columns of the output to plain values; those that may be null are read as empty.

    `generated` tells a completion from scored tokens of the prompt, which are all kept.
    """
    ids = [int(token) for token in row["completion_ids"] or ()]
    text = row["completion"] or ""
    ended = bool(ids) and ids[-1] in tokenizer.all_special_ids
    kept = _length_of_text(ids, text, tokenizer) if generated and row["finish_reason"] == "stop" else len(ids)
    logprobs = [float(value) for value in row["logprobs"] or ()][:kept]
    return Answer(
        row=int(row["row"]),
        scenario=row["scenario"],
        trial=int(row["trial"]),
        instance=row["instance"],
        split=row["split"],
        input=row["input"],
        prompt=row["prompt"],
        references=tuple(row["references"]),
        correct=tuple(bool(flag) for flag in row["correct"]),
        reference_index=int(row["reference_index"]),
        mode=row["request_mode"],
        completion_index=int(row["completion_index"]),
        shots=int(row["shots"]),
        truncated=bool(row["truncated"]),
        prompt_tokens=int(row["prompt_tokens"]),
        text=text,
        token_ids=tuple(ids[:kept]),
        logprobs=tuple(logprobs),
        finish=_finish(row["finish_reason"], generated and ended),
        error=row["error"] or "",
    )


def _length_of_text(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> int:
    """How many tokens lie wholly inside `text`; the rest belong to the end token or to the stop string."""
    kept = len(ids)
    while kept and ids[kept - 1] in tokenizer.all_special_ids:
        kept -= 1
    while kept and len(tokenizer.decode(list(ids[:kept]), skip_special_tokens=True)) > len(text):
        kept -= 1
    return kept


def _finish(reason: str, ended: bool) -> str:
    """HELM tells the end of the text apart from a stop string."""
    if reason == "stop":
        return "endoftext" if ended else "stop"
    return "length" if reason == "length" else "unknown"
