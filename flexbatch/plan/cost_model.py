"""Predicts a run: seconds of a pass as the largest of what each resource must do in it, seconds of a job as the sum
over its passes, peak bytes of each tier. Every term has a name and a unit.

After FlexGen (arXiv 2303.06865, section 4.3), for a different schedule: see docs/cost_model.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.memory_need import (
    MICRO_BATCH_TOKENS,
    Need,
    kv_units,
    needs,
    number_bytes,
    peak_bytes,
    streamable_bytes,
)
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.policy import Policy, Tier
from flexbatch.plan.workload import PassLoad, Schedule, Workload, schedule


class Resource(StrEnum):
    """What works at the same time as the others. A pass takes as long as the busiest."""

    COMPUTE = "compute"
    DISK = "disk"
    HOST_TO_DEVICE = "host to device"
    DEVICE_TO_HOST = "device to host"
    HOST_COMPUTE = "host compute"


@dataclass(frozen=True, slots=True)
class Term:
    """`seconds` that `resource` spends on `what` in one pass, for `amount` of `unit` (FLOP, bytes, numbers, calls)."""

    what: str
    resource: Resource
    seconds: float
    amount: float
    unit: str


@dataclass(frozen=True)
class Prediction:
    """What a run will take. Seconds and bytes are for the whole job; `terms` are summed over its passes.

    `seconds` = sum over passes of the busiest resource; `tokens_per_second` counts generated tokens;
    `row_seconds` is how long one row is in flight. `binding` is the resource that limits most of the passes' time.
    `prefill_seconds` and `decode_seconds` split `seconds` by the arithmetic that each causes. `ramp_seconds` pass until
    the slots are full.
    """

    policy: Policy
    seconds: float
    passes: float
    generated_tokens: float
    prefill_seconds: float
    decode_seconds: float
    ramp_seconds: float
    row_seconds: float
    binding: Resource
    terms: Mapping[str, Term]
    resource_seconds: Mapping[Resource, float]
    needs: tuple[Need, ...]
    peak: Mapping[Tier, int]

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds

    @property
    def pass_seconds(self) -> float:
        return self.seconds / max(1.0, self.passes)


def predict(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> Prediction:
    """The whole job under `policy`. Pure; says nothing about limits (the optimiser compares `peak` with them)."""
    shown = workload if policy.prefix_sharing else workload.without_sharing()
    plan = schedule(shown, policy.slots, policy.prefill_tokens)
    cost = _PassCost(spec, hardware, shown, policy)
    return _summed(plan, cost, needs(spec, hardware, workload, policy))


def pass_seconds(terms: Mapping[Resource, float]) -> float:
    """The resources work side by side; the busiest one is the pass."""
    return max(terms.values())


def by_resource(terms: list[Term]) -> dict[Resource, float]:
    totals = dict.fromkeys(Resource, 0.0)
    for term in terms:
        totals[term.resource] += term.seconds
    return totals


class _PassCost:
    """The terms of one pass, for one policy; each load is worked out once."""

    def __init__(self, spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> None:
        self.spec, self.hardware, self.workload, self.policy = spec, hardware, workload, policy
        self.of = cache(self._of)

    def _of(self, load: PassLoad) -> list[Term]:
        arguments = (self.spec, self.hardware, self.workload, self.policy, load)
        return [
            *prefill_terms(*arguments),
            *decode_terms(*arguments),
            *weight_terms(*arguments[:2], self.policy),
            *kv_terms(*arguments),
            *overhead_terms(*arguments),
        ]


def prefill_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Arithmetic of the prompts that join, shared prefixes included."""
    if not load.joining:
        return
    kind = gemm_format(spec, policy)
    own = load.joining * workload.own_tokens
    tokens = own + load.groups * workload.shared_tokens
    flops = tokens * spec.linear_flops_per_token()
    yield _compute("prefill matrices", flops, hardware.gemm_rate(kind, min(tokens, MICRO_BATCH_TOKENS)))
    length = workload.own_squares / workload.own_tokens
    attention = spec.attention_flops(own, length + workload.shared_tokens)
    attention += load.groups * spec.attention_flops(workload.shared_tokens, workload.shared_tokens)
    yield _compute("prefill attention", attention, hardware.attention_flops)
    yield _compute("head", 2.0 * load.joining * spec.head_parameters, head_rate(spec, hardware, load.joining))


def decode_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Arithmetic of the rows that gain a token, and their attention's walk through the KV cache."""
    if not load.decoding:
        return
    kind = gemm_format(spec, policy)
    flops = load.decoding * spec.linear_flops_per_token()
    yield _compute("decode matrices", flops, hardware.gemm_rate(kind, load.decoding))
    rate, resource = hardware.attention_bytes, Resource.COMPUTE
    positions = workload.own_tokens + workload.new_tokens
    nbytes = attended_bytes(spec, positions) * load.decoding
    away = nbytes * (1.0 - policy.kv.device) if policy.host_attention else 0.0
    yield Term("decode attention", resource, (nbytes - away) / rate, nbytes - away, "bytes")
    if away:
        seconds = away / hardware.host_attention_bytes
        yield Term("decode attention on the host", Resource.HOST_COMPUTE, seconds, away, "bytes")
    if workload.shared_tokens:
        groups = -(-load.decoding // workload.rows_per_group)
        prefix = groups * attended_bytes(spec, workload.shared_tokens)
        work = spec.attention_flops(load.decoding, workload.shared_tokens) / hardware.attention_flops
        yield Term("decode attention to prefixes", resource, prefix / rate + work, prefix, "bytes")
    yield _compute("head", 2.0 * load.decoding * spec.head_parameters, head_rate(spec, hardware, load.decoding))


def weight_terms(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> Iterator[Term]:
    """The streamed share of the weights, once a pass; tied embeddings go by at every place where they are used."""
    again = sum(module.parameters for module in spec.outside if module.shared) * spec.dtype_bytes
    total = streamable_bytes(spec, policy) + again
    from_disk, from_host = total * policy.weights.disk, total * policy.weights.host
    streamed = from_disk + from_host
    if from_disk:
        yield Term("weights from disk", Resource.DISK, from_disk / hardware.disk_read, from_disk, "bytes")
        if not hardware.has_accelerator:
            stolen = from_disk * hardware.read_cpu_seconds / hardware.cores
            yield Term("reader threads", Resource.COMPUTE, stolen, from_disk, "bytes")
    if hardware.has_accelerator and streamed:
        yield Term("weights to device", Resource.HOST_TO_DEVICE, streamed / hardware.host_to_device, streamed, "bytes")
    elif from_host:
        yield Term("weights copied", Resource.COMPUTE, from_host / hardware.memory_copy, from_host, "bytes")
    if policy.weight_bits < 16:
        numbers = sum(layer.matrix_parameters for layer in spec.layers)
        yield Term("dequantise", Resource.COMPUTE, numbers / hardware.dequantize_numbers, numbers, "numbers")
    elif spec.stored_dtype != spec.compute_dtype and streamed:
        yield Term("convert weights", Resource.COMPUTE, streamed / hardware.memory_copy, streamed, "bytes")


def kv_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """KV cache that is not on the device: gathered for decode and written for new tokens, while the maths waits."""
    counts = kv_units(spec, policy)
    units = sum(counts.values())
    per_token = spec.kv_bytes_per_token(policy.kv_bits, number_bytes(spec))
    old = load.decoding * (workload.own_tokens + workload.new_tokens) * per_token
    new = (load.decoding + load.joining * workload.own_tokens) * per_token
    on_disk, on_host = counts[Tier.DISK] / units, counts[Tier.HOST] / units
    if on_disk:
        seconds = old * on_disk / hardware.disk_read + new * on_disk / hardware.disk_write
        yield Term("KV on disk", Resource.COMPUTE, seconds, (old + new) * on_disk, "bytes")
    if on_host and not policy.host_attention:
        seconds = old * on_host / hardware.host_to_device + new * on_host / hardware.device_to_host
        yield Term("KV on host", Resource.COMPUTE, seconds, (old + new) * on_host, "bytes")
    elif on_host:
        yield Term(
            "KV to host", Resource.DEVICE_TO_HOST, new * on_host / hardware.device_to_host, new * on_host, "bytes"
        )
    if policy.kv.device < 1.0 - 1e-9 and not policy.host_attention and policy.kv.device > 0:
        nbytes = old * policy.kv.device
        yield Term("KV gathered", Resource.COMPUTE, nbytes / _device_copy(hardware), nbytes, "bytes")
    if policy.kv_bits < 16:
        numbers = old / per_token * spec.kv_numbers_per_token
        yield Term("KV expanded", Resource.COMPUTE, numbers / hardware.dequantize_numbers, numbers, "numbers")


def overhead_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Calls into the layers, one for each micro-batch, and what a pass costs by itself; hidden states that wait."""
    prompts = load.joining * workload.own_tokens
    batches = -(-prompts // MICRO_BATCH_TOKENS) + (1 if load.decoding else 0)
    calls = batches * len(spec.layers)
    yield Term("layer calls", Resource.COMPUTE, calls * hardware.layer_call_seconds, calls, "calls")
    yield Term("pass", Resource.COMPUTE, hardware.pass_seconds, 1, "passes")
    waiting = (prompts + load.decoding) * spec.hidden_size * number_bytes(spec) * len(spec.layers)
    away = policy.hidden
    if away.host > 0 and waiting:
        nbytes = waiting * away.host
        seconds = nbytes / hardware.host_to_device + nbytes / hardware.device_to_host
        yield Term("hidden states on host", Resource.COMPUTE, seconds, 2 * nbytes, "bytes")
    if away.disk > 0 and waiting:
        nbytes = waiting * away.disk
        seconds = nbytes / hardware.disk_read + nbytes / hardware.disk_write
        yield Term("hidden states on disk", Resource.COMPUTE, seconds, 2 * nbytes, "bytes")


def gemm_format(spec: ModelSpec, policy: Policy) -> str:
    return "int8" if policy.compute == "int8" else spec.compute_dtype


def head_rate(spec: ModelSpec, hardware: HardwareProfile, rows: int) -> float:
    return hardware.gemm_rate(spec.compute_dtype, rows)


def attended_bytes(spec: ModelSpec, positions: float) -> float:
    """Bytes of keys and values that one query row reads over all layers; grouped heads are repeated first."""
    size = number_bytes(spec)
    return sum(2.0 * layer.query_size * size * min(positions, layer.window or positions) for layer in spec.layers)


def _device_copy(hardware: HardwareProfile) -> float:
    return hardware.attention_bytes if hardware.has_accelerator else hardware.memory_copy


def _compute(what: str, flops: float, rate: float) -> Term:
    return Term(what, Resource.COMPUTE, flops / rate, flops, "FLOP")


def _summed(plan: Schedule, cost: _PassCost, items: tuple[Need, ...]) -> Prediction:
    """Adds up the passes of a schedule."""
    seconds, bound = 0.0, dict.fromkeys(Resource, 0.0)
    busy, terms = dict.fromkeys(Resource, 0.0), dict[str, Term]()
    for load, count in plan.loads.items():
        of_pass = cost.of(load)
        totals = by_resource(of_pass)
        longest = pass_seconds(totals)
        seconds += longest * count
        bound[max(totals, key=lambda resource: totals[resource])] += longest * count
        for resource, value in totals.items():
            busy[resource] += value * count
        for term in of_pass:
            terms[term.what] = _added(terms.get(term.what), term, count)
    prefill = sum(term.seconds for what, term in terms.items() if what.startswith("prefill"))
    share = prefill / max(busy[Resource.COMPUTE], 1e-12)
    workload = cost.workload
    in_flight = workload.new_tokens * seconds / max(1.0, plan.passes)
    return Prediction(
        policy=cost.policy,
        seconds=seconds,
        passes=plan.passes,
        generated_tokens=workload.generated_tokens,
        prefill_seconds=seconds * share,
        decode_seconds=seconds * (1.0 - share),
        ramp_seconds=sum(pass_seconds(by_resource(cost.of(load))) * count for load, count in plan.ramp.items()),
        row_seconds=in_flight,
        binding=max(bound, key=lambda resource: bound[resource]),
        terms=terms,
        resource_seconds=busy,
        needs=items,
        peak=peak_bytes(items),
    )


def _added(total: Term | None, term: Term, count: float) -> Term:
    before = (total.seconds, total.amount) if total else (0.0, 0.0)
    return Term(term.what, term.resource, before[0] + term.seconds * count, before[1] + term.amount * count, term.unit)
