"""Shares rounded to what can be placed, by exact byte counts."""

from __future__ import annotations

from dataclasses import replace

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import Limits
from flexbatch.plan.memory_need import needs
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.need import kv_bytes, peak_bytes
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.weight_need import streamable_bytes, tied_bytes, weight_needs
from flexbatch.plan.workload import Workload

NOTHING_RESIDENT = Shares(0.0, 0.0)


def fits(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> bool:
    """Whether no tier holds more than its limit at the job's peak."""
    return limits.exceeded(peak_bytes(needs(spec, hardware, workload, policy))) is None


def least_resident(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> Shares:
    """The weights on the device with which the policy holds least there: none, or only tied ones, for which the stream
    would need more room than they do."""
    tied = Shares(tied_bytes(spec, policy) / streamable_bytes(spec, policy), 0.0)

    def held(weights: Shares) -> int:
        return peak_bytes(weight_needs(spec, hardware, replace(policy, weights=weights)))[Tier.DEVICE]

    return min(NOTHING_RESIDENT, tied, key=held)


def may_fit(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> bool:
    """Whether the policy's activations alone stay inside the device: cheap, before a linear program is set up."""
    still = replace(policy, weights=least_resident(spec, hardware, policy))
    tried = (replace(still, kv=NOTHING_RESIDENT), still)
    return any(peak_bytes(needs(spec, hardware, workload, each))[Tier.DEVICE] <= limits.device for each in tried)


def fitted(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits
) -> Policy | None:
    """The policy rounded to what can be placed: weights, then KV, leave a tier that is too full until the exact bytes
    fit: for the disk, and KV that the host attends to for the host."""
    total = streamable_bytes(spec, policy)
    least = least_resident(spec, hardware, policy).device
    if policy.weights.device < least:
        policy = replace(policy, weights=Shares(least, min(policy.weights.host, 1.0 - least)))
    for _ in range(12):
        items = needs(spec, hardware, workload, policy)
        peak = peak_bytes(items)
        tier = limits.exceeded(peak)
        if tier is None:
            return policy
        excess = peak[tier] - limits.of(tier)
        weights = _moved(policy.weights, tier, excess / total + 1e-4, least)
        kv = _moved(policy.kv, tier, excess / max(1, kv_bytes(items)) + 1e-3, least=0.0)
        if weights is not None:
            policy = replace(policy, weights=weights)
        elif kv is not None and policy.host_attention and tier is Tier.DEVICE:
            policy = replace(policy, kv=Shares(kv.device, 1.0 - kv.device))
        elif kv is not None and (hardware.has_accelerator or policy.kv.disk > 0) and not policy.host_attention:
            policy = replace(policy, kv=kv)
        else:
            return None
    return None


def filled(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, limits: Limits) -> Policy:
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
            if more > 1e-3 and fits(spec, hardware, workload, tried, limits):
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
