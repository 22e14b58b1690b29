"""What one pass does: named terms, each an amount of something, and the seconds that one resource spends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.kv_rooms import written_anew
from flexbatch.plan.memory_need import (
    MICRO_BATCH_TOKENS,
    TOGETHER_TOKENS,
    attends_packed,
    cache_form,
    is_gathered,
    kv_unit_bytes,
    prompts_bytes,
)
from flexbatch.plan.model_spec import COMPRESSED, ModelSpec
from flexbatch.plan.need import Need, first_used_bytes
from flexbatch.plan.policy import Policy
from flexbatch.plan.rows_in_flight import usual_rows
from flexbatch.plan.weight_need import gemm_format, held_weights, number_bytes, streamable_bytes, weight_form
from flexbatch.plan.workload import PassLoad, Workload, stored_columns

# Packing a number of the KV cache takes so many times as long as expanding one: by a kernel on a CPU (measured: 2 to
# 4), by torch elsewhere (6 at 8 bits, 9 at 4 bits).
PACKING_TIMES, PACKING_TIMES_ELSEWHERE = 4, 8

# Calling an expert costs so much of calling a layer.
EXPERT_CALL = 0.08

# A write through the page cache takes so many times as long as one past it (docs/benchmarks.md).
MAPPED_WRITE = 3.0


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


def pass_seconds(terms: Mapping[Resource, float]) -> float:
    """The resources work side by side; the busiest one is the pass."""
    return max(terms.values())


def by_resource(terms: list[Term]) -> dict[Resource, float]:
    totals = dict.fromkeys(Resource, 0.0)
    for term in terms:
        totals[term.resource] += term.seconds
    return totals


def pass_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> list[Term]:
    """Everything that one pass with this load does."""
    return [
        *prefill_terms(spec, hardware, workload, policy, load),
        *decode_terms(spec, hardware, workload, policy, load),
        *weight_terms(spec, hardware, policy, kept_bytes(spec, hardware, workload, policy, load)),
        *kv_terms(spec, hardware, workload, policy, load),
        *overhead_terms(spec, hardware, workload, policy, load),
    ]


def first_terms(hardware: HardwareProfile, items: Iterable[Need]) -> Iterator[Term]:
    """What happens once: main memory is found and cleared as the cache and the rest fill it for the first time."""
    if not hardware.has_accelerator:
        nbytes = first_used_bytes(items)
        yield Term("memory touched first", Resource.COMPUTE, nbytes / hardware.memory_touch, nbytes, "bytes")


def prefill_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Arithmetic of the prompts that join, shared prefixes included."""
    if not load.joining:
        return
    own = load.joining * workload.own_tokens
    tokens = own + load.groups * workload.shared_tokens
    together = tokens + (load.decoding if spec.side_by_side else 0.0)
    yield _matrices("prefill matrices", spec, hardware, policy, tokens, min(together, TOGETHER_TOKENS))
    yield activation_term("prefill activations", spec, hardware, tokens)
    length = workload.own_squares / workload.own_tokens
    attention = spec.attention_flops(own, length)
    attention += prefix_pairs(hardware) * spec.attention_flops(own, workload.shared_tokens)
    attention += load.groups * spec.attention_flops(workload.shared_tokens, workload.shared_tokens)
    yield _compute("prefill attention", attention, hardware.attention_flops)
    yield _compute("head", 2.0 * load.joining * spec.head_parameters, head_rate(spec, hardware, load.joining))


def decode_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Arithmetic of the rows that gain a token, and their attention's walk through the KV cache."""
    if not load.decoding:
        return
    beside = load.joining * workload.own_tokens if spec.side_by_side else 0.0
    together = min(load.decoding + beside, max(load.decoding, TOGETHER_TOKENS))
    yield _matrices("decode matrices", spec, hardware, policy, load.decoding, together)
    yield activation_term("decode activations", spec, hardware, load.decoding)
    rate, resource = hardware.attention_bytes, Resource.COMPUTE
    positions = workload.own_tokens + workload.new_tokens
    if latent := sum(layer.expansion_parameters for layer in spec.layers):
        expansion = 2.0 * load.decoding * positions * latent
        many = min(load.decoding * positions, MICRO_BATCH_TOKENS)
        yield _compute("keys and values from latent ones", expansion, hardware.gemm_rate(spec.compute_dtype, many))
    nbytes = attended_bytes(spec, positions) * load.decoding
    away = nbytes * (1.0 - policy.kv.device) if policy.host_attention else 0.0
    if attends_packed(spec, hardware, policy):
        numbers = nbytes / number_bytes(spec)
        compressed = policy.compressed_cache
        speed = hardware.compressed_attention_numbers if compressed else hardware.packed_attention_numbers
        yield Term("decode attention", resource, numbers / speed, numbers, "numbers")
    else:
        yield Term("decode attention", resource, (nbytes - away) / rate, nbytes - away, "bytes")
    if away:
        seconds = away / hardware.host_attention_bytes
        yield Term("decode attention on the host", Resource.HOST_COMPUTE, seconds, away, "bytes")
    if workload.shared_tokens:
        groups = -(-load.decoding // workload.rows_per_group)
        prefix = groups * attended_bytes(spec, workload.shared_tokens)
        work = prefix_pairs(hardware) * spec.attention_flops(load.decoding, workload.shared_tokens)
        work /= hardware.attention_flops
        yield Term("decode attention to prefixes", resource, prefix / rate + work, prefix, "bytes")
    yield _compute("head", 2.0 * load.decoding * spec.head_parameters, head_rate(spec, hardware, load.decoding))


def kept_bytes(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad) -> float:
    """Bytes of weights that lie where rows and prompts were: where the system takes memory back piece by piece."""
    if hardware.has_accelerator or not load.last:
        return 0.0
    planned = load.idle * policy.slots / usual_rows(workload, policy)
    idle = max(0.0, planned - policy.slots * (1.0 - policy.kv.device))
    converted = spec.dtype_bytes / number_bytes(spec) if weight_form(policy) == 16 else 1.0
    of_rows = idle * len(spec.layers) * kv_unit_bytes(spec, workload, policy)
    return (of_rows + prompts_bytes(spec, workload, policy)) * converted


def weight_terms(spec: ModelSpec, hardware: HardwareProfile, policy: Policy, kept: float = 0.0) -> Iterator[Term]:
    """The streamed share of the weights without the `kept` bytes, once a pass; tied embeddings that are not on the
    device go by again."""
    total, again = streamable_bytes(spec, policy), held_weights(spec, policy).again
    from_disk, from_host = total * policy.weights.disk, total * policy.weights.host
    if again:
        away = from_disk + from_host
        from_disk, from_host = (part * (1.0 + again / away) for part in (from_disk, from_host))
    from_disk = max(0.0, from_disk - kept)
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
    form = weight_form(policy)
    numbers = spec.packed_numbers
    if form in (8, 4):
        seconds = numbers / hardware.dequantize_numbers
        yield Term("dequantise", Resource.COMPUTE, seconds, numbers, "numbers")
    elif form == COMPRESSED and gemm_format(spec, hardware, policy) != "compressed":
        seconds = numbers / (hardware.expansion_numbers or hardware.dequantize_numbers)
        yield Term("expand weights", Resource.COMPUTE, seconds, numbers, "numbers")
    elif form == 16 and spec.stored_dtype != spec.compute_dtype and streamed:
        yield Term("convert weights", Resource.COMPUTE, streamed / hardware.memory_copy, streamed, "bytes")


def kv_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """KV cache that is not on the device: gathered for decode and written for new tokens, while the maths waits."""
    per_token = spec.kv_bytes_per_token(cache_form(policy), number_bytes(spec))
    old = load.decoding * (workload.own_tokens + workload.new_tokens) * per_token
    new = (load.decoding + load.joining * workload.own_tokens) * per_token
    on_disk, on_host = policy.kv.disk, policy.kv.host
    if on_disk:
        # Read ahead like weights, and written behind: rows once, and again where they grow long. On a CPU that is all;
        # attention on an accelerator waits for a copy as well (computed, not measured).
        stored = stored_columns(workload) * per_token * on_disk
        read = load.decoding * stored
        written = (load.joining + load.decoding * written_anew(workload.new_tokens)) * stored
        yield Term("KV read from disk", Resource.DISK, read / hardware.disk_read, read, "bytes")
        yield Term("KV written to disk", Resource.DISK, written / hardware.disk_write, written, "bytes")
        if hardware.has_accelerator:
            yield Term("KV to device", Resource.COMPUTE, read / hardware.host_to_device, read, "bytes")
        else:
            stolen = (read + written) * hardware.read_cpu_seconds / hardware.cores
            yield Term("KV threads", Resource.COMPUTE, stolen, read + written, "bytes")
    if on_host and not policy.host_attention:
        seconds = old * on_host / hardware.host_to_device + new * on_host / hardware.device_to_host
        yield Term("KV on host", Resource.COMPUTE, seconds, (old + new) * on_host, "bytes")
    elif on_host:
        yield Term(
            "KV to host", Resource.DEVICE_TO_HOST, new * on_host / hardware.device_to_host, new * on_host, "bytes"
        )
    if is_gathered(spec, policy):
        nbytes = old * policy.kv.device if hardware.has_accelerator else old
        yield Term("KV gathered", Resource.COMPUTE, nbytes / _device_copy(hardware), nbytes, "bytes")
    if cache_form(policy) < 16:
        # Decoding rows expand all that they attend to, where attention does not read it as it is kept; whoever makes a
        # token packs it, and prompts see theirs expanded, those that enter in parts all that came before.
        fed = load.joining * workload.own_tokens + load.groups * workload.shared_tokens
        packed = (fed + load.decoding) * spec.kv_numbers_per_token
        parts = max(1.0, workload.own_tokens / policy.prefill_tokens) if policy.shortest_part else 1.0
        own = -1.0 if policy.compressed_cache else 1.0  # what is as it was made need not be expanded at once
        seen = fed * (parts + own) / 2.0
        seen += 0.0 if attends_packed(spec, hardware, policy) else old / per_token
        expanded = seen * spec.kv_numbers_per_token
        yield Term("KV expanded", Resource.COMPUTE, expanded / hardware.dequantize_numbers, expanded, "numbers")
        times = PACKING_TIMES_ELSEWHERE if hardware.has_accelerator else PACKING_TIMES
        seconds = times * packed / hardware.dequantize_numbers
        yield Term("KV packed", Resource.COMPUTE, seconds, packed, "numbers")


def overhead_terms(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy, load: PassLoad
) -> Iterator[Term]:
    """Calls into the layers, one for each micro-batch, and what a pass costs by itself; hidden states that wait."""
    prompts = load.joining * workload.own_tokens
    if spec.side_by_side:
        batches = -(-(prompts + load.decoding) // TOGETHER_TOKENS)
    else:
        batches = -(-prompts // MICRO_BATCH_TOKENS) + (1 if load.decoding else 0)
    calls = batches * sum(1 + EXPERT_CALL * (layer.mixture.experts if layer.mixture else 0) for layer in spec.layers)
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
        seconds = nbytes / hardware.disk_read + MAPPED_WRITE * nbytes / hardware.disk_write
        yield Term("hidden states on disk", Resource.COMPUTE, seconds, 2 * nbytes, "bytes")


def head_rate(spec: ModelSpec, hardware: HardwareProfile, rows: float) -> float:
    return hardware.gemm_rate(spec.compute_dtype, rows, spec.hidden_size)


def activation_term(what: str, spec: ModelSpec, hardware: HardwareProfile, tokens: float) -> Term:
    """What lies between the matrix products, by the numbers that a token's way through all layers touches."""
    numbers = tokens * spec.activation_numbers
    return Term(what, Resource.COMPUTE, numbers / hardware.activation_numbers, numbers, "numbers")


def prefix_pairs(hardware: HardwareProfile) -> float:
    """What a query and a key before its prompt cost, in pairs of a prompt with itself: half of those are masked, and a
    CPU's kernel leaves them out."""
    return 1.0 if hardware.has_accelerator else 2.0


def attended_bytes(spec: ModelSpec, positions: float) -> float:
    """Bytes of keys and values that one query row reads over all layers; grouped heads are repeated first."""
    return 2.0 * number_bytes(spec) * spec.attended_numbers(positions)


def _device_copy(hardware: HardwareProfile) -> float:
    return hardware.attention_bytes if hardware.has_accelerator else hardware.memory_copy


def _matrices(
    what: str, spec: ModelSpec, hardware: HardwareProfile, policy: Policy, tokens: float, together: float
) -> Term:
    """The linear layers' products for `tokens`, each `together` with others; the tokens are divided among experts."""
    kind, width = gemm_format(spec, hardware, policy), spec.hidden_size
    flops = tokens * spec.linear_flops_per_token
    seconds, of_experts = 0.0, 0.0
    for mixture, layers in spec.mixtures.items():
        part = 2.0 * tokens * layers * mixture.active_parameters
        seconds += part / hardware.gemm_rate(kind, mixture.rows(together), width)
        of_experts += part
    seconds += (flops - of_experts) / hardware.gemm_rate(kind, together, width)
    return Term(what, Resource.COMPUTE, seconds, flops, "FLOP")


def _compute(what: str, flops: float, rate: float) -> Term:
    return Term(what, Resource.COMPUTE, flops / rate, flops, "FLOP")
