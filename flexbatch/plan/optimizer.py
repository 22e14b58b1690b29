"""Chooses the policy of a run: slots and prefill by enumeration, shares by linear program, exact bytes at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from flexbatch.config import OffloadConfig, parse_bytes
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.plan.admission import EVEN
from flexbatch.plan.cost_model import Prediction, by_resource, first_terms, pass_seconds, pass_terms, predict
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import LIMIT_KEYS, Limits, gibibytes, limits_of
from flexbatch.plan.memory_need import kv_bytes, needs, peak_bytes, streamable_bytes, tied_bytes
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import ALL_DEVICE, Policy, Shares, Tier
from flexbatch.plan.shares_program import Problem, best_shares
from flexbatch.plan.workload import PassLoad, Workload, schedule

# No more rows in flight than this: beyond, weight traffic is long paid for and only latency grows.
MOST_SLOTS = 4096

# Prompts that fill more than this in one pass gain nothing by it, and a pass is what a kill loses: beyond, a pass takes
# only what keeps the slots full.
MOST_PREFILL_TOKENS = 32768

# Multiples of the prompt tokens that keep the slots full, tried where prompts enter in parts.
PREFILL_TIMES = (0.5, 0.8, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, math.inf)

# So many of the linear program's best candidates are predicted exactly.
FINALISTS = 12

# Between predictions this close, the one with fewer slots wins: rows then finish sooner.
CLOSE = 0.002

# Part of the time for which twice the memory is not taken.
NOTHING_TO_SPEAK_OF = 0.01

NOTHING_RESIDENT = Shares(0.0, 0.0)


def choose_policy(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig
) -> tuple[Policy, Prediction]:
    """The policy of a run and what it predicts: the fastest that stays inside the limits.

    What the user fixed (percent, slots, prefill tokens, bits, compute, prefix sharing) stays as it is; slots never
    exceed the rows. Raises `CapacityError` that names the limit and the smallest change that makes the run feasible.
    """
    check_formats(spec, hardware, offload)
    limits = limits_of(hardware, offload)
    candidates = (
        _manual(spec, hardware, workload, offload, limits)
        if offload.policy == "manual"
        else _automatic(spec, hardware, workload, offload, limits)
    )
    feasible = [made for made in candidates if limits.exceeded(made.peak) is None]
    if not feasible:
        raise infeasible(spec, hardware, workload, offload, limits)
    best = pick(feasible)
    if offload.policy == "auto" and offload.slots == "auto":
        best = _modest(spec, hardware, workload, best)
    return best.policy, best


def frontier(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig
) -> list[Prediction]:
    """The best policy for every power of two of slots that fits: what more rows in flight cost a row, and win."""
    made = []
    for power in range(min(workload.rows, MOST_SLOTS).bit_length()):
        try:
            made.append(choose_policy(spec, hardware, workload, replace(offload, slots=1 << power))[1])
        except CapacityError:
            break
    return made


def pick(predictions: Sequence[Prediction]) -> Prediction:
    """The fastest; of those that are as fast, the one with the fewest slots."""
    fastest = min(prediction.seconds for prediction in predictions)
    close = [prediction for prediction in predictions if prediction.seconds <= fastest * (1.0 + CLOSE)]
    return min(close, key=lambda prediction: (prediction.policy.slots, prediction.seconds))


def _modest(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, best: Prediction) -> Prediction:
    """`best`, or where all is resident half its slots again and again, as long as that costs next to no time: a small
    model's cache would otherwise grow with the dataset, for nothing."""
    if best.policy.weights.device < 1.0 or best.policy.kv.device < 1.0:
        return best
    modest = best
    while modest.policy.slots > 1:
        fewer = predict(spec, hardware, workload, replace(modest.policy, slots=modest.policy.slots // 2))
        if fewer.seconds > best.seconds * (1.0 + NOTHING_TO_SPEAK_OF):
            break
        modest = fewer
    return modest


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
    )


def check_formats(spec: ModelSpec, hardware: HardwareProfile, offload: OffloadConfig) -> None:
    """The machine's figures must cover the number format that the maths runs in."""
    kind = "int8" if offload.compute == "int8" else spec.compute_dtype
    if kind not in hardware.gemm:
        raise ConfigError(
            f"hardware {hardware.name!r} has no gemm rates for {kind}; it has {', '.join(hardware.gemm)}.",
            remedy="Choose another model.dtype or offload.compute, or add the rates to the hardware file.",
        )


def _automatic(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, limits: Limits
) -> Iterator[Prediction]:
    """The linear program's best candidates, rounded and predicted: a coarse search, then a fine one around its best."""
    base = base_policy(offload)
    forms = [replace(base, weights=weights) for weights in (ALL_DEVICE, NOTHING_RESIDENT)]
    ladder = slot_counts(workload, offload)
    coarse = [
        replace(form, slots=slots, prefill_tokens=_steady(workload, offload, slots, form))
        for slots in ladder
        for form in forms
    ]
    ranked = _ranked(spec, hardware, workload, limits, coarse)
    if ranked:
        around = _around(ranked[0][1].slots, ladder)
        fine = [
            policy for form in forms for policy in _enumerated(workload, offload, form, around) if policy not in coarse
        ]
        ranked = sorted(ranked + _ranked(spec, hardware, workload, limits, fine, ranked[0][0]), key=_seconds)
    found = 0
    for _, policy in ranked[:FINALISTS]:
        rounded = _fitted(spec, hardware, workload, policy, limits)
        if rounded is not None:
            found += 1
            yield predict(spec, hardware, workload, _filled(spec, hardware, workload, rounded, limits))
    if not found:
        # So little room that the linear program's margins do not fit: nothing resident, as many slots as there may be;
        # the cache on disk only where no slot fits otherwise.
        for kv in (ALL_DEVICE, NOTHING_RESIDENT):
            tried = [replace(policy, weights=NOTHING_RESIDENT, kv=kv) for policy in coarse]
            fitting = [policy for policy in tried if _fits(spec, hardware, workload, policy, limits)]
            yield from (predict(spec, hardware, workload, policy) for policy in fitting)
            if fitting:
                return


def _fits(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> bool:
    return limits.exceeded(peak_bytes(needs(spec, hardware, workload, policy))) is None


def _seconds(ranked: tuple[float, Policy]) -> float:
    return ranked[0]


def _ranked(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    limits: Limits,
    policies: Iterable[Policy],
    best: float = math.inf,
) -> list[tuple[float, Policy]]:
    """Policies with their best shares and the linear program's seconds, fastest first. What could not beat `best` even
    if nothing had to be moved is left out."""
    bounded = []
    for policy in policies:
        if _may_fit(spec, hardware, workload, policy, limits):
            shown = workload if policy.prefix_sharing else workload.without_sharing()
            passes = _kinds_of_passes(shown, policy)
            still = replace(policy, weights=ALL_DEVICE)
            loads = ((count, by_resource(pass_terms(spec, hardware, shown, still, load))) for load, count in passes)
            items = needs(spec, hardware, workload, still)
            first = sum(term.seconds for term in first_terms(hardware, still, items))
            bound = first + sum(count * pass_seconds(resources) for count, resources in loads)
            bounded.append((bound, first, policy, Problem(spec, hardware, shown, limits, passes)))
    # Attention in main memory is for a cache that is there, and as it was computed.
    ranked: list[tuple[float, Policy]] = []
    for bound, first, policy, problem in sorted(bounded, key=lambda each: each[0]):
        if bound > best:
            break
        for host_attention in (False, True) if hardware.has_accelerator and policy.kv_bits == 16 else (False,):
            shared = best_shares(problem, replace(policy, host_attention=host_attention))
            ranked += [(first + seconds, made) for seconds, made in shared]
        best = min([best, *(seconds for seconds, _ in ranked)])
    return sorted(ranked, key=_seconds)


def _enumerated(
    workload: Workload, offload: OffloadConfig, base: Policy, slot_ladder: Iterable[int]
) -> Iterator[Policy]:
    for slots in slot_ladder:
        for tokens in prefill_counts(workload, offload, slots, base):
            yield replace(base, slots=slots, prefill_tokens=tokens)


def slot_counts(workload: Workload, offload: OffloadConfig) -> list[int]:
    """Slots to try: what the user fixed (never more than the rows), else a ladder with steps of about a half."""
    most = min(workload.rows, MOST_SLOTS)
    if str(offload.slots) != "auto":
        return [min(workload.rows, int(offload.slots))]
    ladder = {1, 2, 3, 4, 5, 6, 7, 8, most}
    for power in range(3, 12):
        ladder |= {2**power, 2**power * 3 // 2, 2 ** (power + 1)}
    return sorted(slots for slots in ladder if slots <= most)


def _around(slots: int, ladder: Sequence[int]) -> list[int]:
    """`slots`, its neighbours on the ladder, and up to three steps between it and either."""
    place = ladder.index(slots)
    low, high = ladder[max(0, place - 1)], ladder[min(len(ladder) - 1, place + 1)]
    below = {slots - (slots - low) * step // 4 for step in range(5)}
    above = {slots + (high - slots) * step // 4 for step in range(5)}
    return sorted(below | above)


def _steady(workload: Workload, offload: OffloadConfig, slots: int, base: Policy) -> int:
    """Prompt tokens per pass that just keep the slots full."""
    if str(offload.prefill_tokens) != "auto":
        return int(offload.prefill_tokens)
    shown = workload if base.prefix_sharing else workload.without_sharing()
    rows = slots / max(1.0, shown.new_tokens)
    return math.ceil(shown.own_tokens * (rows if base.shortest_part else math.ceil(rows)))


def prefill_counts(workload: Workload, offload: OffloadConfig, slots: int, base: Policy) -> list[int]:
    """Prompt tokens per pass to try: what keeps the slots full, and less and more; whole prompts where they enter
    whole."""
    if str(offload.prefill_tokens) != "auto":
        return [int(offload.prefill_tokens)]
    shown = workload if base.prefix_sharing else workload.without_sharing()
    steady = shown.own_tokens * slots / max(1.0, shown.new_tokens)
    most = min(slots * shown.own_tokens, max(steady, MOST_PREFILL_TOKENS))
    if base.shortest_part:
        tried = (max(base.shortest_part, min(steady * times, most)) for times in PREFILL_TIMES)
        return sorted({math.ceil(tokens / EVEN) * EVEN for tokens in tried})
    rows = math.ceil(slots / max(1.0, shown.new_tokens))
    joining = sorted({1, max(1, rows // 2), rows, rows + 1, 2 * rows, slots})
    return [
        math.ceil(count * shown.own_tokens)
        for count in joining
        if count * shown.own_tokens <= max(most, rows * shown.own_tokens)
    ]


def _kinds_of_passes(workload: Workload, policy: Policy) -> tuple[tuple[PassLoad, float], ...]:
    """The job's passes as at most two kinds: the mean of those that prefill, the mean of those that only decode."""
    loads = schedule(workload, policy.slots, policy.prefill_tokens, policy.shortest_part).loads
    kinds = []
    for prefills in (True, False):
        mine = {load: count for load, count in loads.items() if (load.joining > 0) is prefills}
        count = sum(mine.values())
        if count:
            mean = PassLoad(
                sum(load.joining * times for load, times in mine.items()) / count,
                sum(load.decoding * times for load, times in mine.items()) / count,
                sum(load.groups * times for load, times in mine.items()) / count,
            )
            kinds.append((mean, count))
    return tuple(kinds)


def _may_fit(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> bool:
    """Whether the policy's activations alone stay inside the device: cheap, before a linear program is set up."""
    away = replace(policy, weights=NOTHING_RESIDENT, kv=NOTHING_RESIDENT)
    return peak_bytes(needs(spec, hardware, workload, away))[Tier.DEVICE] <= limits.device or (
        peak_bytes(needs(spec, hardware, workload, replace(policy, weights=NOTHING_RESIDENT)))[Tier.DEVICE]
        <= limits.device
    )


def _fitted(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits
) -> Policy | None:
    """The policy rounded to what can be placed: weights, then KV, leave a tier that is too full until the exact bytes
    fit."""
    total = streamable_bytes(spec, policy)
    tied = tied_bytes(spec, policy) / total
    if 0.0 < policy.weights.device < tied:
        policy = replace(policy, weights=Shares(tied, min(policy.weights.host, 1.0 - tied)))
    for _ in range(12):
        items = needs(spec, hardware, workload, policy)
        peak = peak_bytes(items)
        tier = limits.exceeded(peak)
        if tier is None:
            return policy
        excess = peak[tier] - limits.of(tier)
        # Tied weights stay as long as they can: without them the stream needs room for them.
        least = tied if policy.weights.device > tied * (1.0 + 1e-9) else 0.0
        weights = _moved(policy.weights, tier, excess / total + 1e-4, least)
        if weights is not None and weights.device < tied:
            weights = replace(weights, device=0.0)
        kv = _moved(policy.kv, tier, excess / max(1, kv_bytes(items)) + 1e-3, least=0.0)
        if weights is not None:
            policy = replace(policy, weights=weights)
        elif kv is not None and hardware.has_accelerator and not policy.host_attention:
            policy = replace(policy, kv=kv)
        else:
            return None
    return None


def _filled(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> Policy:
    """What room is left on the device, used: first for KV that is on disk, then for weights."""
    for kind in ("kv", "weights"):
        shares: Shares = getattr(policy, kind)
        if shares.disk <= 0:
            continue
        items = needs(spec, hardware, workload, policy)
        total = streamable_bytes(spec, policy) if kind == "weights" else kv_bytes(items)
        room = (limits.device - peak_bytes(items)[Tier.DEVICE]) / max(1, total)
        for part in (1.0, 0.7, 0.4):
            more = min(shares.disk, room * part)
            grown = Shares(1.0, 0.0) if shares.device + more > 1 - 1e-9 else Shares(shares.device + more, shares.host)
            tried = replace(policy, weights=grown) if kind == "weights" else replace(policy, kv=grown)
            if more > 1e-3 and limits.exceeded(peak_bytes(needs(spec, hardware, workload, tried))) is None:
                policy = tried
                break
    return policy


def _moved(shares: Shares, tier: Tier, excess: float, least: float) -> Shares | None:
    """`excess` away from `tier` towards the disk, `least` staying on the device; None where no more can go."""
    if tier is Tier.DEVICE and shares.device > least:
        return Shares(max(least, shares.device - excess), shares.host)
    if tier is Tier.HOST and shares.host > 0:
        return Shares(shares.device, max(0.0, shares.host - excess))
    return None


def _manual(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, limits: Limits
) -> Iterator[Prediction]:
    """The user's shares, with every slots and prefill that he left open."""
    weights, kv, hidden = Policy.percent_shares(list(offload.percent))
    base = replace(base_policy(offload), weights=weights, kv=kv, hidden=hidden)
    for policy in _enumerated(workload, offload, base, slot_counts(workload, offload)):
        if limits.exceeded(peak_bytes(needs(spec, hardware, workload, policy))) is None:
            yield predict(spec, hardware, workload, policy)


def infeasible(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, limits: Limits
) -> CapacityError:
    """Which limit cannot be met, by how much, and the smallest change that would make the run feasible."""
    base = base_policy(offload)
    smallest = next(_enumerated(workload, offload, base, slot_counts(workload, offload)))
    if offload.policy == "manual":
        weights, kv, hidden = Policy.percent_shares(list(offload.percent))
        least = replace(smallest, weights=weights, kv=kv, hidden=hidden)
    else:
        least = replace(smallest, weights=NOTHING_RESIDENT)
        if limits.exceeded(peak_bytes(needs(spec, hardware, workload, least))) is Tier.DEVICE:
            least = _smaller(spec, hardware, workload, least, replace(least, kv=NOTHING_RESIDENT))
    items = needs(spec, hardware, workload, least)
    peak = peak_bytes(items)
    tier = limits.exceeded(peak) or Tier.DEVICE
    largest = sorted((item for item in items if item.tier is tier), key=lambda item: -item.nbytes)[:4]
    what = ", ".join(f"{item.what} {gibibytes(item.nbytes)}" for item in largest)
    change = f"Raise {LIMIT_KEYS[tier]} to {gibibytes(math.ceil(peak[tier] * 1.01))}"
    if tier is Tier.DISK:
        change = f"Free {gibibytes(peak[tier] - limits.disk)} on the disk of {LIMIT_KEYS[tier]}, or name another"
    if str(offload.slots) != "auto" and least.slots > 1:
        change += f", or lower offload.slots (now {offload.slots})"
    elif offload.policy == "manual":
        change += ", or lower that tier's share in offload.percent"
    return CapacityError(
        f"{spec.name or 'the model'} does not fit: with {least.slots} slots it needs at least "
        f"{gibibytes(peak[tier])} on the {tier.value} ({what}), and the limit is {gibibytes(limits.of(tier))}.",
        remedy=change + ".",
    )


def _smaller(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, first: Policy, second: Policy) -> Policy:
    """Of two policies, the one that needs less of the device."""
    return min((first, second), key=lambda policy: peak_bytes(needs(spec, hardware, workload, policy))[Tier.DEVICE])
