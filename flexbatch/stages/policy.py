"""Which policy the job runs under: the user's own, or the plan's."""

from __future__ import annotations

from flexbatch.config import Config
from flexbatch.plan.policy import Policy
from flexbatch.stages.work import Work

DEFAULT_SLOTS = 32
DEFAULT_PREFILL_TOKENS = 4096


def choose(config: Config, work: Work) -> Policy:
    offload = config.offload
    slots = DEFAULT_SLOTS if offload.slots == "auto" else int(offload.slots)
    prefill = DEFAULT_PREFILL_TOKENS if offload.prefill_tokens == "auto" else int(offload.prefill_tokens)
    if work.total:
        slots = min(slots, work.total)
    shares = Policy.percent_shares(offload.percent if offload.policy == "manual" else [100, 0, 100, 0, 100, 0])
    return Policy(*shares, slots=slots, prefill_tokens=prefill)
