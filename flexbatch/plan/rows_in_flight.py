"""How many rows of a job are in flight, and how many guesses of theirs a pass may be fed with."""

from __future__ import annotations

from dataclasses import dataclass

from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import Policy
from flexbatch.plan.slot_layout import most_slots, usual_slots
from flexbatch.plan.workload import Workload

# Guesses that every row in flight may have in a pass (fewer rows may have more), if it may say so many tokens; and how
# many times as fast prompts may come where guesses are right. Of either no more tokens than these: they take memory.
GUESSES = 4
FEWEST_TO_GUESS = 8
MOST_PACE = 1.5
MOST_MORE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class GuessRoom:
    """How many `tokens` a pass may be fed with as guesses (0: none), of how many positions their `logits` are made at
    once (0: of all), and the `token_seconds` of arithmetic that each takes at least."""

    tokens: int = 0
    logits: int = 0
    token_seconds: float = 0.0


def _may_be_cut(policy: Policy) -> bool:
    """Whether the KV cache may be cut into other slots as rows come: where it is in one memory."""
    return policy.more_if_short and max(policy.kv.device, policy.kv.host) > 1.0 - 1e-9


def usual_rows(workload: Workload, policy: Policy) -> int:
    """How many rows are in flight on the average."""
    return usual_slots(workload.as_run(policy.prefix_sharing), policy.slots) if _may_be_cut(policy) else policy.slots


def most_rows(workload: Workload, policy: Policy) -> int:
    """How many rows are in flight at most."""
    return most_slots(workload.as_run(policy.prefix_sharing), policy.slots) if _may_be_cut(policy) else policy.slots


def guessed_tokens(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """How many guesses a pass may be fed with: where it can wait for weights, and rows are long enough to guess."""
    is_streamed = policy.weights.device < 1.0 - 1e-9
    suits = policy.guesses and spec.side_by_side and is_streamed and policy.kv_bits == 16
    if not suits or workload.longest_new < FEWEST_TO_GUESS:
        return 0
    return min(GUESSES * most_rows(workload, policy), MOST_MORE_TOKENS)


def hastened(prefill_tokens: float, pace: float) -> float:
    """Prompt tokens of a pass whose rows gain so many tokens on the average."""
    return min(prefill_tokens * min(pace, MOST_PACE), prefill_tokens + MOST_MORE_TOKENS)
