"""The linear program that chooses the nine shares for given slots, prefill and formats (FlexGen, section 4.3).

Seconds of a kind of pass are a variable that is at least what each resource must do in it; what a resource does, and
the bytes that a tier holds, are linear in the shares. Two things are steps rather than lines (weights that stream at
all need a prefetch buffer, KV that is anywhere else must be gathered), so each combination is a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import Limits
from flexbatch.plan.memory_need import needs
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.need import peak_bytes
from flexbatch.plan.policy import ALL_DEVICE, Policy, Shares, Tier
from flexbatch.plan.terms import Resource, by_resource, pass_terms
from flexbatch.plan.workload import PassLoad, Workload

KINDS = ("weights", "kv", "hidden")
TIERS = tuple(Tier)
SHARES = tuple((kind, tier) for kind in KINDS for tier in TIERS)

# What lies away from the device costs this part of the time more, on the disk twice: on a tie, what is nearer wins.
NEARNESS = 1e-5
DISTANCE = {Tier.DEVICE: 0.0, Tier.HOST: 1.0, Tier.DISK: 2.0}

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What is fixed while the shares are chosen. `passes` are the kinds of passes with how often each occurs; the
    workload is as the engine sees it (prefixes shared or not)."""

    spec: ModelSpec
    hardware: HardwareProfile
    workload: Workload
    limits: Limits
    passes: tuple[tuple[PassLoad, float], ...]


def best_shares(problem: Problem, policy: Policy) -> Iterator[tuple[float, Policy]]:
    """Each case's best policy with its seconds, as the linear program sees them; nothing where none is feasible."""
    # With the whole cache on the device there is nothing for the host to attend to. Where device and host are one
    # memory, rows on disk are worth it only if they share the weights' way from there, and if attention takes a cache
    # that is apart.
    if problem.hardware.has_accelerator:
        cases: tuple[bool, ...] = (True,) if policy.host_attention else (False, True)
    else:
        cases = (False, True) if policy.weights.device < 1.0 and problem.spec.side_by_side else (False,)
    for split_kv in cases:
        found = _solve(problem, policy, _open_tiers(problem.hardware, policy, split_kv))
        if found is not None:
            yield found


def _open_tiers(hardware: HardwareProfile, policy: Policy, split_kv: bool) -> dict[str, tuple[Tier, ...]]:
    """The tiers besides the device on which each kind of tensor may be in this case. A policy with all weights on the
    device keeps them there: how prompts enter depends on it."""
    split_weights = policy.weights.device < 1.0
    others = (Tier.HOST, Tier.DISK) if hardware.has_accelerator else (Tier.DISK,)
    kv = (Tier.HOST,) if policy.host_attention else others
    return {"weights": others if split_weights else (), "kv": kv if split_kv else (), "hidden": others}


def _solve(problem: Problem, policy: Policy, open_tiers: dict[str, tuple[Tier, ...]]) -> tuple[float, Policy] | None:
    kinds, count = len(KINDS), len(problem.passes)
    seconds = [_Line.of(problem, policy, open_tiers, load) for load, _ in problem.passes]
    nbytes = _Line.of(problem, policy, open_tiers, None)
    rows = [np.concatenate([slope, np.zeros(count)]) for slope in nbytes.slopes]
    above = [problem.limits.of(tier) - nbytes.start[index] for index, tier in enumerate(TIERS)]
    for index, line in enumerate(seconds):
        mine = np.zeros(count)
        mine[index] = -1.0
        rows += [np.concatenate([slope, mine]) for slope in line.slopes]
        above += list(-line.start)
    times = np.array([times for _, times in problem.passes])
    away = np.array([DISTANCE[tier] for _, tier in SHARES])
    whole = float(sum(line.start.max() * count for line, count in zip(seconds, times, strict=True)))
    sums = np.zeros((kinds, len(SHARES) + count))
    for index, (kind, _) in enumerate(SHARES):
        sums[KINDS.index(kind), index] = 1.0
    allowed = [(0.0, 1.0) if tier is Tier.DEVICE or tier in open_tiers[kind] else (0.0, 0.0) for kind, tier in SHARES]
    solved = linprog(
        np.concatenate([away * NEARNESS * whole, times]),
        np.array(rows),
        np.array(above),
        sums,
        np.ones(kinds),
        [*allowed, *[(0.0, None)] * count],
        method="highs",
    )
    if not solved.success:
        return None
    chosen = dict(zip(SHARES, solved.x.tolist(), strict=False))
    return float(times @ solved.x[len(SHARES) :]), _with_shares(policy, chosen)


@dataclass(frozen=True)
class _Line:
    """Some amounts as `start + slopes @ shares`, where the device's shares have slope 0 (they are 1 minus the rest)."""

    start: Vector
    slopes: Vector

    @staticmethod
    def of(problem: Problem, policy: Policy, open_tiers: dict[str, tuple[Tier, ...]], load: PassLoad | None) -> _Line:
        """Seconds of each resource in a pass with this load, or (without one) bytes of each tier.

        Measured on the cost model itself, at shares inside the case, so that the two can never differ.
        """
        halves = {("weights", Tier.DEVICE): 1.0, ("kv", Tier.DEVICE): 1.0, ("hidden", Tier.DEVICE): 1.0}
        for kind, tiers in open_tiers.items():
            for tier in tiers:
                halves[kind, tier] = 0.25
                halves[kind, Tier.DEVICE] -= 0.25
        middle = _amounts(problem, _with_shares(policy, halves), load)
        slopes = np.zeros((len(middle), len(SHARES)))
        for index, (kind, tier) in enumerate(SHARES):
            if tier in open_tiers[kind]:
                moved = {**halves, (kind, tier): 0.5, (kind, Tier.DEVICE): halves[kind, Tier.DEVICE] - 0.25}
                slopes[:, index] = (_amounts(problem, _with_shares(policy, moved), load) - middle) / 0.25
        start = middle - slopes @ np.array([halves.get(share, 0.0) for share in SHARES])
        return _Line(start, slopes)


def _amounts(problem: Problem, policy: Policy, load: PassLoad | None) -> Vector:
    if load is None:
        peak = peak_bytes(needs(problem.spec, problem.hardware, problem.workload, policy))
        return np.array([float(peak[tier]) for tier in TIERS])
    totals = by_resource(pass_terms(problem.spec, problem.hardware, problem.workload, policy, load))
    return np.array([totals[resource] for resource in Resource])


def _with_shares(policy: Policy, chosen: dict[tuple[str, Tier], float]) -> Policy:
    def share(kind: str) -> Shares:
        device, host = (min(1.0, max(0.0, chosen.get((kind, tier), 0.0))) for tier in (Tier.DEVICE, Tier.HOST))
        disk = chosen.get((kind, Tier.DISK), 0.0)
        return ALL_DEVICE if device > 1.0 - 1e-9 else Shares(device, 1.0 - device if disk < 1e-9 else host)

    return replace(policy, weights=share("weights"), kv=share("kv"), hidden=share("hidden"))
