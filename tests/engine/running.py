"""Runs small models through the engine, and compares tokens with Transformers'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from flexbatch.engine.engine import Constraint, Engine
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.opening import UNLIMITED, Checkpoint, EngineOptions, Limits, open_engine
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy
from flexbatch.plan.rows_in_flight import GuessRoom
from flexbatch.records import Completion, PassResult, Request
from tests.engine.families import logits

# Two logits closer than this are a tie in float32: sums in another order differ by more.
TIE = 1e-4


class NumberDecoder:
    """Stands for a tokenizer: token 17 reads `17 `."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(f"{token} " for token in token_ids)


def engine(
    folder: Path,
    policy: Policy,
    span: int,
    disk_folder: Path,
    *,
    end_tokens: Iterable[int] = (2,),
    padded_width: int = 0,
    constraints: Mapping[str, Constraint] | None = None,
    limits: Limits | None = None,
    dtype: torch.dtype = torch.float32,
    planned_bytes: int = UNLIMITED,
    prompts_bytes: int = 0,
    most_slots: int = 0,
    guess_room: int = 0,
    logits_of_guesses: int = 0,
) -> Engine:
    checkpoint = Checkpoint(AutoConfig.from_pretrained(folder), SafetensorsIndex.open(folder).entries, str(folder))
    return open_engine(
        checkpoint,
        policy,
        limits or Limits(disk_folder=disk_folder),
        Vocabulary(NumberDecoder(), frozenset(end_tokens)),
        EngineOptions(
            span,
            dtype,
            padded_width=padded_width,
            planned_bytes=planned_bytes,
            prompts_bytes=prompts_bytes,
            most_slots=most_slots,
            guesses=GuessRoom(guess_room, logits_of_guesses),
            reader="buffered",
            constraints=constraints or {},
            packed_folder=disk_folder / "packed",
        ),
    )


def answer(running: Engine, requests: Iterable[Request]) -> tuple[dict[int, Completion], list[PassResult]]:
    """All completions by index, and what every pass brought. Closes the engine."""
    try:
        passes = list(running.run(iter(requests)))
    finally:
        running.close()
    return {done.index: done for result in passes for done in result.completions}, passes


def assert_same_tokens(family: str, prompt: tuple[int, ...], got: Iterable[int], want: Iterable[int]) -> None:
    """Equal, or different from a step on at which the model's two logits are shown to tie."""
    got, want = list(got), list(want)
    if got == want:
        return
    step = next(i for i, pair in enumerate(zip([*got, -1], [*want, -1], strict=False)) if pair[0] != pair[1])
    assert step < min(len(got), len(want)), f"{family}: {len(got)} tokens instead of {len(want)}: {got} {want}"
    scores = logits(family, prompt + tuple(want[:step]))
    margin = float(scores[want[step]] - scores[got[step]])
    assert abs(margin) < TIE, f"{family}: token {step} is {got[step]} instead of {want[step]}, by a margin of {margin}"
