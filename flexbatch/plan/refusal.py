"""Why nothing fits: the binding limit, and the smallest change that makes a run feasible."""

from __future__ import annotations

import math
from dataclasses import replace

from flexbatch.config import OffloadConfig
from flexbatch.errors import CapacityError
from flexbatch.plan.enumeration import base_policy, enumerated, slot_counts
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import LIMIT_KEYS, Limits, gibibytes
from flexbatch.plan.memory_need import needs
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.need import peak_bytes
from flexbatch.plan.policy import Policy, Tier
from flexbatch.plan.rounding import NOTHING_RESIDENT, least_resident
from flexbatch.plan.workload import Workload


def infeasible(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, limits: Limits
) -> CapacityError:
    """Which limit cannot be met, by how much, and the smallest change that would make the run feasible."""
    base = replace(base_policy(offload), guesses=False)
    smallest = next(enumerated(workload, offload, base, slot_counts(workload, offload)))
    if offload.policy == "manual":
        weights, kv, hidden = Policy.percent_shares(list(offload.percent))
        least = replace(smallest, weights=weights, kv=kv, hidden=hidden)
    else:
        least = replace(smallest, weights=least_resident(spec, hardware, smallest))
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
