"""The policies that are tried: numbers of slots, and of prompt tokens per pass for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from flexbatch.config import OffloadConfig, parse_bytes
from flexbatch.plan.policy import Policy
from flexbatch.plan.workload import Workload

# No more rows in flight than this: beyond, weight traffic is long paid for and only latency grows.
MOST_SLOTS = 4096

# Prompts that fill more than this in one pass gain nothing by it, and a pass is what a kill loses: beyond, a pass takes
# only what keeps the slots full.
MOST_PREFILL_TOKENS = 32768

# Multiples of the prompt tokens that keep the slots full, tried where prompts enter in parts.
PREFILL_TIMES = (0.5, 0.8, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, math.inf)


def base_policy(offload: OffloadConfig) -> Policy:
    """The user's formats and budgets; everything on the device, one slot."""
    prefetch = 0 if str(offload.prefetch_bytes) == "auto" else parse_bytes(offload.prefetch_bytes, key="prefetch_bytes")
    return Policy(
        slots=1,
        prefill_tokens=1,
        weight_bits=offload.weight_bits,
        kv_bits=offload.kv_bits,
        compute=offload.compute,
        prefix_sharing=offload.prefix_sharing,
        prefetch_bytes=prefetch,
        more_if_short=str(offload.slots) == "auto",
        guesses=offload.lookup,
    )


def enumerated(
    workload: Workload, offload: OffloadConfig, base: Policy, slot_ladder: Iterable[int]
) -> Iterator[Policy]:
    for slots in slot_ladder:
        for tokens in prefill_counts(workload, offload, slots, base):
            yield admitting(replace(base, slots=slots), workload, tokens)


def admitting(policy: Policy, workload: Workload, tokens: int) -> Policy:
    """The policy with so many prompt tokens per pass. Where these are whole prompts of the one length that all have,
    nothing is left over that a part would fill, and no room is needed for a prompt that has entered in part."""
    length = _length_of_all(workload, policy)
    is_even = length > 0 and tokens % length == 0
    return replace(policy, prefill_tokens=tokens, whole_prompts=is_even and policy.shortest_part > 0)


def _length_of_all(workload: Workload, policy: Policy) -> int:
    """Tokens of every prompt; 0 where they differ, or share what not all may have."""
    shown = workload.as_run(policy.prefix_sharing)
    is_one = set(shown.prompt_lengths) == {shown.longest_prompt}
    return shown.longest_prompt if is_one and not shown.shared_tokens else 0


def slot_counts(workload: Workload, offload: OffloadConfig) -> list[int]:
    """Slots to try: what the user fixed (never more than the rows), else a ladder with steps of about a half."""
    most = min(workload.rows, MOST_SLOTS)
    if str(offload.slots) != "auto":
        return [min(workload.rows, int(offload.slots))]
    ladder = {1, 2, 3, 4, 5, 6, 7, 8, most}
    for power in range(3, 12):
        ladder |= {2**power, 2**power * 3 // 2, 2 ** (power + 1)}
    return sorted(slots for slots in ladder if slots <= most)


def around(slots: int, ladder: Sequence[int]) -> list[int]:
    """`slots`, its neighbours on the ladder, and up to three steps between it and either."""
    place = ladder.index(slots)
    low, high = ladder[max(0, place - 1)], ladder[min(len(ladder) - 1, place + 1)]
    below = {slots - (slots - low) * step // 4 for step in range(5)}
    above = {slots + (high - slots) * step // 4 for step in range(5)}
    return sorted(below | above)


def steady_tokens(workload: Workload, offload: OffloadConfig, slots: int, base: Policy) -> int:
    """Prompt tokens per pass that just keep the slots full."""
    if str(offload.prefill_tokens) != "auto":
        return int(offload.prefill_tokens)
    shown = workload.as_run(base.prefix_sharing)
    if base.shortest_part:
        return math.ceil(_steady(shown, slots))
    return math.ceil(shown.own_tokens * math.ceil(slots / max(1.0, shown.new_tokens)))


def _steady(shown: Workload, slots: int) -> float:
    """Prompt tokens per pass that just keep the slots full where prompts are split: one slot's is entering, the others
    are held for a pass for each token after the first."""
    if shown.shared_tokens:
        return shown.own_tokens * slots / max(1.0, shown.new_tokens)
    return shown.own_tokens * max(1, slots - 1) / max(1.0, shown.new_tokens - 1.0)


def prefill_counts(workload: Workload, offload: OffloadConfig, slots: int, base: Policy) -> list[int]:
    """Prompt tokens per pass to try: what keeps the slots full, and less and more; whole prompts where they enter
    whole."""
    if str(offload.prefill_tokens) != "auto":
        return [int(offload.prefill_tokens)]
    shown = workload.as_run(base.prefix_sharing)
    steady = _steady(shown, slots)
    most = min(slots * shown.own_tokens, max(steady, MOST_PREFILL_TOKENS))
    if base.shortest_part:
        tried = {math.ceil(max(base.shortest_part, min(steady * times, most))) for times in PREFILL_TIMES}
        if length := _length_of_all(workload, base):
            tried |= {length * max(1, round(tokens / length)) for tokens in tried}
        return sorted(tried)
    rows = math.ceil(slots / max(1.0, shown.new_tokens))
    joining = sorted({1, max(1, rows // 2), rows, rows + 1, 2 * rows, slots})
    return [
        math.ceil(count * shown.own_tokens)
        for count in joining
        if count * shown.own_tokens <= max(most, rows * shown.own_tokens)
    ]
