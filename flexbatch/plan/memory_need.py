"""How many bytes a policy needs on each tier, item by item: what admission compares with the limits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.placement import place_slots
from flexbatch.plan.policy import Policy, Tier
from flexbatch.plan.workload import Workload, columns, joining_limit

# A prefill micro-batch has about this many padded tokens (the engine's schedule packs them so).
MICRO_BATCH_TOKENS = 2048

# Columns of the KV arena between two shifts.
COLUMN_SLACK = 64


@dataclass(frozen=True, slots=True)
class Need:
    """One named use of a tier, in bytes."""

    what: str
    tier: Tier
    nbytes: int


def number_bytes(spec: ModelSpec) -> int:
    """Size of a number in the compute type."""
    return 4 if spec.compute_dtype == "float32" else 2


def streamable_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes that the shares of `policy.weights` cut up: layers, embeddings and head, as stored."""
    return spec.weight_bytes(policy.weight_bits) - spec.small_parameters * spec.dtype_bytes


def largest_tensor_bytes(spec: ModelSpec, policy: Policy) -> int:
    """The unit of weight placement: no share is held more exactly than to one tensor."""
    layers = max(layer.largest_tensor for layer in spec.layers) * min(spec.dtype_bytes * 8, policy.weight_bits) // 8
    return max([layers, *(module.parameters * spec.dtype_bytes for module in spec.outside)])


def largest_stop_bytes(spec: ModelSpec, policy: Policy) -> int:
    """The most that is needed at one moment: a layer, an embedding or the head."""
    outside = (module.parameters * spec.dtype_bytes for module in spec.outside)
    return max([spec.largest_layer_bytes(policy.weight_bits), *outside])


def prefetch_need(spec: ModelSpec, policy: Policy) -> int:
    """Device bytes of the weight stream: twice the largest unit unless the policy says otherwise."""
    if policy.weights.device >= 1.0 - 1e-9:
        return 0
    largest = math.ceil(largest_stop_bytes(spec, policy) * min(1.0, 1.0 - policy.weights.device + 0.1))
    return max(policy.prefetch_bytes, largest) if policy.prefetch_bytes else 2 * largest


def kv_units(spec: ModelSpec, policy: Policy) -> dict[Tier, int]:
    """(slot, layer) units of the KV cache on each tier, exactly as placement will cut them."""
    counts = place_slots(len(spec.layers), policy.slots, policy.kv)
    device, host = sum(count[0] for count in counts), sum(count[1] for count in counts)
    return {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: len(spec.layers) * policy.slots - device - host}


def kv_unit_bytes(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """Bytes of one slot of one layer, all columns."""
    per_token = spec.kv_bytes_per_token(policy.kv_bits, number_bytes(spec)) / len(spec.layers)
    return math.ceil(columns(_as_run(workload, policy), COLUMN_SLACK) * per_token)


def needs(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> tuple[Need, ...]:
    """Every use of every tier at the job's peak."""
    workload = _as_run(workload, policy)
    items = [
        Need("process", Tier.DEVICE, hardware.process_bytes),
        *_weight_needs(spec, policy),
        *_kv_needs(spec, workload, policy),
        *_activation_needs(spec, workload, policy),
    ]
    return tuple(item for item in items if item.nbytes > 0)


def peak_bytes(items: Iterable[Need]) -> dict[Tier, int]:
    totals = dict.fromkeys(Tier, 0)
    for item in items:
        totals[item.tier] += item.nbytes
    return totals


def _as_run(workload: Workload, policy: Policy) -> Workload:
    return workload if policy.prefix_sharing else workload.without_sharing()


def _weight_needs(spec: ModelSpec, policy: Policy) -> list[Need]:
    total, unit = streamable_bytes(spec, policy), largest_tensor_bytes(spec, policy)
    device, host = policy.weights.device, policy.weights.host
    resident = total if device >= 1.0 - 1e-9 else math.ceil(total * device) + unit * (device > 0)
    on_host = math.ceil(total * host) + unit * (0 < host < 1)
    expanded = 0
    if policy.weight_bits < 16 or spec.stored_dtype != spec.compute_dtype:
        expanded = max(layer.parameters for layer in spec.layers) * number_bytes(spec)
    return [
        Need("small weights", Tier.DEVICE, spec.small_parameters * number_bytes(spec)),
        Need("resident weights", Tier.DEVICE, min(total, resident)),
        Need("weight stream", Tier.DEVICE, prefetch_need(spec, policy)),
        Need("one layer expanded", Tier.DEVICE, expanded),
        Need("weights", Tier.HOST, min(total, on_host)),
    ]


def _kv_needs(spec: ModelSpec, workload: Workload, policy: Policy) -> list[Need]:
    unit, counts = kv_unit_bytes(spec, workload, policy), kv_units(spec, policy)
    items = [Need("KV cache", tier, count * unit) for tier, count in counts.items()]
    if policy.kv.device < 1.0 - 1e-9 and not policy.host_attention:
        items.append(Need("KV of one layer, gathered", Tier.DEVICE, policy.slots * unit))
    if policy.kv_bits < 16:
        plain = spec.kv_bytes_per_token(16, number_bytes(spec)) / len(spec.layers)
        items.append(Need("KV of one layer, expanded", Tier.DEVICE, int(policy.slots * columns(workload, 0) * plain)))
    if workload.shared_tokens:
        groups = math.ceil(policy.slots / workload.rows_per_group) + 1
        nbytes = groups * workload.shared_tokens * spec.kv_bytes_per_token(16, number_bytes(spec))
        items.append(Need("KV of shared prefixes", Tier.DEVICE, math.ceil(nbytes)))
    return items


def _activation_needs(spec: ModelSpec, workload: Workload, policy: Policy) -> list[Need]:
    size = number_bytes(spec)
    joining = min(policy.slots, joining_limit(workload, policy.prefill_tokens))
    longest = max(1.0, workload.longest_prompt - math.floor(workload.shared_tokens))
    tokens = math.ceil(joining * longest)
    one_batch = min(tokens, max(MICRO_BATCH_TOKENS, math.ceil(longest)))
    query = max(layer.query_size for layer in spec.layers)
    inner = (2 * spec.intermediate_size + 4 * spec.hidden_size + 4 * query) * size
    attended = policy.slots * columns(workload, 0)
    waiting = (tokens + policy.slots) * spec.hidden_size * size
    logits = (policy.slots + joining) * spec.vocab_size * (size + 4)
    share = policy.hidden
    return [
        Need("activations", Tier.DEVICE, max(one_batch, policy.slots) * inner + attended * 8),
        Need("logits", Tier.DEVICE, logits),
        Need("hidden states", Tier.DEVICE, math.ceil(waiting * (share.device if share.device < 1 else 1.0))),
        Need("hidden states", Tier.HOST, math.ceil(waiting * share.host)),
        Need("hidden states", Tier.DISK, math.ceil(waiting * share.disk)),
    ]
