"""Chooses the policy of a run: slots and prefill by enumeration, shares by linear program, exact bytes at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from flexbatch.config import OffloadConfig
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.plan.compressed_file import is_worth, may_compress
from flexbatch.plan.cost_model import Prediction, predict
from flexbatch.plan.enumeration import (
    MOST_SLOTS,
    admitting,
    around,
    base_policy,
    enumerated,
    slot_counts,
    steady_tokens,
)
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import Limits, limits_of
from flexbatch.plan.memory_need import may_compress_cache, needs
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import ALL_DEVICE, Policy
from flexbatch.plan.refusal import infeasible
from flexbatch.plan.rounding import NOTHING_RESIDENT, filled, fits, fitted, least_resident, may_fit
from flexbatch.plan.rows_in_flight import usual_rows
from flexbatch.plan.shares_program import Problem, best_shares
from flexbatch.plan.terms import by_resource, first_terms, pass_seconds, pass_terms
from flexbatch.plan.workload import PassLoad, Workload, schedule

# So many of the linear program's best candidates are predicted exactly, of those whose cache stays on the device and of
# the others: what it leaves out (that arithmetic and the disk take turns, whole slots) differs between the two.
FINALISTS = 12

# Between predictions this close, the one with fewer slots wins: rows then finish sooner.
CLOSE = 0.002

# Between predictions this close, where weights pass by, the one with fewer passes wins: each costs more than what can
# be foreseen of it (docs/benchmarks.md).
CLOSE_PASSES = 0.015
MORE_SLOTS = 16  # counts of slots that are tried for it

# Part of the time for which twice the memory is not taken.
NOTHING_TO_SPEAK_OF = 0.01

# Part of the time that a compressed cache must save: the plan sees some of what fewer passes save.
WORTH_IT = 0.005

# Rows whose plan a longer job follows where all is resident in main memory. The longer the job, the more slots still
# bring a little, because it pays only once for filling and emptying them; but what a job holds must not grow with it.
ENOUGH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class _Search:
    """For what the fastest policy of `base`'s form inside the limits is looked for."""

    spec: ModelSpec
    hardware: HardwareProfile
    workload: Workload
    offload: OffloadConfig
    limits: Limits
    base: Policy

    def fits(self, policy: Policy) -> bool:
        return fits(self.spec, self.hardware, self.workload, policy, self.limits)

    def predict(self, policy: Policy) -> Prediction:
        return predict(self.spec, self.hardware, self.workload, policy)


def choose_policy(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig
) -> tuple[Policy, Prediction]:
    """The policy of a run and what it predicts: the fastest that stays inside the limits.

    What the user fixed (percent, slots, prefill tokens, bits, compute, prefix sharing) stays as it is; slots never
    exceed the rows. Raises `CapacityError` that names the limit and the smallest change that makes the run feasible.
    """
    check_formats(spec, hardware, offload)
    search = _Search(spec, hardware, workload, offload, limits_of(hardware, offload), base_policy(offload))
    best = _of_all_forms(search)
    if best is None and search.base.guesses:  # they take memory that nothing else may be left of
        best = _of_all_forms(replace(search, base=replace(search.base, guesses=False)))
    if best is None:
        raise infeasible(spec, hardware, workload, offload, search.limits)
    return best.policy, best


def _of_all_forms(search: _Search) -> Prediction | None:
    """The fastest policy, with weights and cache as they are or in fewer bytes; None where nothing fits."""
    best, choice = _plain_or_compressed(search), search.offload.compressed_cache
    can_be = search.offload.kv_bits == 16 and may_compress_cache(search.spec, search.hardware)
    if choice == "never" or not can_be or (choice == "auto" and best is not None and _is_resident(best.policy)):
        return best
    weights = best is not None and best.policy.compressed
    other = _best(replace(search, base=replace(search.base, compressed=weights, compressed_cache=True)))
    if not (best and other):
        return best or other
    if choice == "always" or other.seconds < best.seconds * (1.0 - WORTH_IT):
        return other
    return pick([best, other]) if best.policy.weights.device < 1.0 else best


def _plain_or_compressed(search: _Search) -> Prediction | None:
    """The fastest policy, with the weights as they are or in fewer bytes; None where nothing fits."""
    plain, compressed = _best(search), None
    if may_compress(search.spec, search.hardware, search.offload) and (plain is None or plain.policy.weights.disk > 0):
        compressed = _best(replace(search, base=replace(search.base, compressed=True)))
    if not (plain and compressed):
        return plain or compressed
    is_better = is_worth(search.offload.compressed_file, search.spec, search.hardware, compressed, plain)
    return compressed if is_better else plain


def _best(search: _Search) -> Prediction | None:
    """The fastest policy; None where nothing fits. A job of many rows holds no more memory than one of `ENOUGH_ROWS`,
    where that is all it needs."""
    like_shorter = _like_a_shorter_job(search)
    if like_shorter is not None:
        return like_shorter
    candidates = _manual(search) if search.offload.policy == "manual" else _automatic(search)
    feasible = [made for made in candidates if search.limits.exceeded(made.peak) is None]
    if not feasible:
        return None
    best = pick(feasible)
    if not _chooses_slots(search.offload):
        return best
    return _modest(search, best) if _is_resident(best.policy) else pick([best, *_with_more_slots(search, best)])


def _like_a_shorter_job(search: _Search) -> Prediction | None:
    """What a job of `ENOUGH_ROWS` of these rows would follow, with what it takes for all of them. None where the job is
    no longer than that, its slots are not the plan's to choose, or not all would be resident in main memory."""
    is_long = search.workload.rows > ENOUGH_ROWS and search.limits.one_memory and _chooses_slots(search.offload)
    if not (is_long and search.fits(search.base)):
        return None
    shorter = _best(replace(search, workload=replace(search.workload, rows=ENOUGH_ROWS)))
    if shorter is None or not (_is_resident(shorter.policy) and search.fits(shorter.policy)):
        return None
    return search.predict(shorter.policy)


def _chooses_slots(offload: OffloadConfig) -> bool:
    return offload.policy == "auto" and offload.slots == "auto"


def _is_resident(policy: Policy) -> bool:
    """Whether weights and cache are all on the device."""
    return policy.weights.device >= 1.0 and policy.kv.device >= 1.0


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
    """The fastest. Of those that are as fast, where weights pass by, the one with the fewest passes and no less of the
    cache on the device; else the one with the fewest slots."""
    best = min(predictions, key=lambda prediction: prediction.seconds)
    if best.policy.weights.device < 1.0:
        kept = [prediction for prediction in predictions if prediction.policy.kv.device >= best.policy.kv.device]
        return min(_close(kept, CLOSE_PASSES), key=lambda prediction: (prediction.passes, prediction.seconds))
    close = _close(predictions, CLOSE)
    return min(close, key=lambda prediction: (prediction.policy.slots, prediction.seconds))


def _close(predictions: Sequence[Prediction], part: float) -> list[Prediction]:
    """Those that take at most so much more time than the fastest."""
    fastest = min(prediction.seconds for prediction in predictions)
    return [prediction for prediction in predictions if prediction.seconds <= fastest * (1.0 + part)]


def _modest(search: _Search, best: Prediction) -> Prediction:
    """`best`, where all is resident, or half its slots again and again, as long as that costs next to no time: a small
    model's cache would otherwise grow with the dataset, for nothing."""
    modest = best
    while modest.policy.slots > 1:
        fewer = search.predict(replace(modest.policy, slots=modest.policy.slots // 2))
        if fewer.seconds > best.seconds * (1.0 + NOTHING_TO_SPEAK_OF):
            break
        modest = fewer
    return modest


def _with_more_slots(search: _Search, best: Prediction) -> Iterator[Prediction]:
    """The same shares of the cache for up to twice the slots, and what is left for weights."""
    policy, workload = best.policy, search.workload
    step = max(1, policy.slots // MORE_SLOTS)
    for slots in range(policy.slots + step, min(2 * policy.slots, workload.rows, MOST_SLOTS) + 1, step):
        more = replace(policy, slots=slots, weights=NOTHING_RESIDENT)
        tokens = steady_tokens(workload, search.offload, slots, more)
        rounded = fitted(search.spec, search.hardware, workload, admitting(more, workload, tokens), search.limits)
        if rounded is None:
            return
        yield search.predict(filled(search.spec, search.hardware, workload, rounded, search.limits))


def check_formats(spec: ModelSpec, hardware: HardwareProfile, offload: OffloadConfig) -> None:
    """The machine's figures must cover the number format that the maths runs in."""
    kind = "int8" if offload.compute == "int8" else spec.compute_dtype
    if kind not in hardware.gemm:
        raise ConfigError(
            f"hardware {hardware.name!r} has no gemm rates for {kind}; it has {', '.join(hardware.gemm)}.",
            remedy="Choose another model.dtype or offload.compute, or add the rates to the hardware file.",
        )


def _automatic(search: _Search) -> Iterator[Prediction]:
    """The linear program's best candidates, rounded and predicted: a coarse search, then a fine one around its best."""
    spec, hardware, workload, offload = search.spec, search.hardware, search.workload, search.offload
    limits = search.limits
    forms = [replace(search.base, weights=weights) for weights in (ALL_DEVICE, NOTHING_RESIDENT)]
    ladder = slot_counts(workload, offload)
    coarse = [
        admitting(replace(form, slots=slots), workload, steady_tokens(workload, offload, rows, form))
        for slots in ladder
        for form in forms
        for rows in {slots, usual_rows(workload, replace(form, slots=slots))}
    ]
    ranked = _ranked(spec, hardware, workload, limits, coarse)
    if ranked:
        near = around(ranked[0][1].slots, ladder)
        fine = [
            policy for form in forms for policy in enumerated(workload, offload, form, near) if policy not in coarse
        ]
        ranked = sorted(ranked + _ranked(spec, hardware, workload, limits, fine, ranked[0][0]), key=_seconds)
    found = 0
    for policy in _finalists(ranked):
        rounded = fitted(spec, hardware, workload, policy, limits)
        if rounded is not None:
            found += 1
            yield search.predict(filled(spec, hardware, workload, rounded, limits))
    if not found:
        # So little room that the linear program's margins do not fit: nothing resident, as many slots as there may be;
        # the cache on disk only where no slot fits otherwise.
        for kv in (ALL_DEVICE, NOTHING_RESIDENT):
            away = [replace(policy, kv=kv) for policy in coarse]
            tried = [replace(each, weights=least_resident(spec, hardware, each)) for each in away]
            fitting = [policy for policy in tried if search.fits(policy)]
            yield from (search.predict(policy) for policy in fitting)
            if fitting:
                return


def _finalists(ranked: list[tuple[float, Policy]]) -> Iterator[Policy]:
    for stays in (True, False):
        yield from islice((policy for _, policy in ranked if (policy.kv == ALL_DEVICE) is stays), FINALISTS)


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
        if may_fit(spec, hardware, workload, policy, limits):
            shown = workload.as_run(policy.prefix_sharing)
            still = replace(policy, weights=ALL_DEVICE)
            items = needs(spec, hardware, workload, still)
            first = sum(term.seconds for term in first_terms(hardware, items))
            for rows, caches in _rows_in_flight(shown, policy):
                passes = _kinds_of_passes(shown, policy, rows)
                loads = ((count, by_resource(pass_terms(spec, hardware, shown, still, load))) for load, count in passes)
                bound = first + sum(count * pass_seconds(resources) for count, resources in loads)
                bounded.append((bound, first, policy, Problem(spec, hardware, shown, limits, passes), caches))
    # Attention in main memory is for a cache that is there, and as it was computed.
    ranked: list[tuple[float, Policy]] = []
    for bound, first, policy, problem, caches in sorted(bounded, key=lambda each: each[0]):
        if bound > best:
            break
        for host_attention in (False, True) if hardware.has_accelerator and policy.kv_bits == 16 else (False,):
            shared = best_shares(problem, replace(policy, host_attention=host_attention))
            ranked += [(first + seconds, made) for seconds, made in shared if (made.kv == ALL_DEVICE) in caches]
        best = min([best, *(seconds for seconds, _ in ranked)])
    return sorted(ranked, key=_seconds)


def _rows_in_flight(workload: Workload, policy: Policy) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """How many rows are in flight on the average, and for what caches: those all on the device (True), others."""
    usual = usual_rows(workload, policy)
    if usual > policy.slots:
        yield usual, (True,)
        yield policy.slots, (False,)
    else:
        yield policy.slots, (True, False)


def _kinds_of_passes(workload: Workload, policy: Policy, rows: int) -> tuple[tuple[PassLoad, float], ...]:
    """The job's passes as at most two kinds: the mean of those that prefill, the mean of those that only decode."""
    loads = schedule(workload, rows, policy.prefill_tokens, policy.shortest_part).loads
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


def _manual(search: _Search) -> Iterator[Prediction]:
    """The user's shares, with every slots and prefill that he left open."""
    offload, workload = search.offload, search.workload
    weights, kv, hidden = Policy.percent_shares(list(offload.percent))
    base = replace(search.base, weights=weights, kv=kv, hidden=hidden)
    for policy in enumerated(workload, offload, base, slot_counts(workload, offload)):
        if search.fits(policy):
            yield search.predict(policy)
