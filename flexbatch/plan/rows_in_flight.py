"""How many rows of a job are in flight, and how many guesses of theirs a pass may be fed with."""

from __future__ import annotations

from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import Policy
from flexbatch.plan.slot_layout import most_slots, usual_slots
from flexbatch.plan.workload import Workload

# Guesses that every row in flight may have in a pass (fewer rows may have more), if it may say so many tokens; and by
# how much prompts may come faster where guesses are right.
GUESSES = 4
FEWEST_TO_GUESS = 8
MOST_PACE = 1.5


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
    return GUESSES * most_rows(workload, policy) if suits and workload.longest_new >= FEWEST_TO_GUESS else 0
