"""FlexGen's block schedule (arXiv 2303.06865, section 4.3), predicted with the same kinds of figures, for comparison.

All rows of a block are prefilled in one walk over the layers, then each decode step is one more walk: our schedule in
which every slot is filled in one pass and none is filled again before all are done. What differs is kept as it was:
attention to KV in main memory runs on the CPU while the accelerator waits, and compressed weights and KV are expanded
again for every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.model_spec import QUANTIZATION_GROUP, ModelSpec, packed_bytes
from flexbatch.plan.policy import ALL_DEVICE, Shares
from flexbatch.plan.terms import Resource, Term, by_resource, pass_seconds

# FLOP/s of a decode step's matrix products as the authors fitted it on their T4; few rows are slower still.
DECODE_FLOPS = 4.3e12


@dataclass(frozen=True, slots=True)
class BlockPolicy:
    """A block is `batches` micro-batches of `batch` rows. Shares and bits as in `Policy`."""

    batch: int
    batches: int
    weights: Shares = ALL_DEVICE
    kv: Shares = ALL_DEVICE
    hidden: Shares = ALL_DEVICE
    weight_bits: int = 16
    kv_bits: int = 16
    host_attention: bool = False

    @property
    def rows(self) -> int:
        return self.batch * self.batches


@dataclass(frozen=True)
class BlockPrediction:
    """Seconds of one block: its prefill, all its decode steps; generated tokens per second; the terms of each."""

    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    prefill: tuple[Term, ...]
    step: tuple[Term, ...]


def predict_block_schedule(
    spec: ModelSpec, hardware: HardwareProfile, policy: BlockPolicy, *, prompt: int = 512, new: int = 32
) -> BlockPrediction:
    """One block of `policy.rows` prompts of `prompt` tokens, `new` tokens generated for each."""
    prefill = (*_weights(spec, hardware, policy), *_prefill(spec, hardware, policy, prompt))
    step = (*_weights(spec, hardware, policy), *_step(spec, hardware, policy, prompt + new / 2))
    first = pass_seconds(by_resource(list(prefill)))
    others = (new - 1) * pass_seconds(by_resource(list(step)))
    return BlockPrediction(first, others, policy.rows * new / (first + others), prefill, step)


def _weights(spec: ModelSpec, hardware: HardwareProfile, policy: BlockPolicy) -> Iterator[Term]:
    """One walk's weight traffic, and their expansion, which the block schedule repeats for every micro-batch."""
    total = sum(spec.layer_bytes(layer, policy.weight_bits) for layer in spec.layers)
    read, moved = total * policy.weights.disk, total * (1.0 - policy.weights.device)
    yield Term("weights from disk", Resource.DISK, read / hardware.disk_read, read, "bytes")
    yield Term("weights to device", Resource.HOST_TO_DEVICE, moved / hardware.host_to_device, moved, "bytes")
    if policy.weight_bits < 16:
        numbers = float(spec.packed_numbers * policy.batches)
        yield Term("dequantise", Resource.COMPUTE, numbers / hardware.dequantize_numbers, numbers, "numbers")


def _prefill(spec: ModelSpec, hardware: HardwareProfile, policy: BlockPolicy, prompt: int) -> Iterator[Term]:
    tokens = policy.rows * prompt
    flops = float(tokens * spec.linear_flops_per_token)
    rate = hardware.gemm_rate(spec.compute_dtype, policy.batch * prompt)
    yield Term("prefill matrices", Resource.COMPUTE, flops / rate, flops, "FLOP")
    attention = spec.attention_flops(tokens, prompt)
    yield Term("prefill attention", Resource.COMPUTE, attention / hardware.attention_flops, attention, "FLOP")
    nbytes = tokens * _kv_bytes(spec, policy) * (1.0 - policy.kv.device)
    yield Term("KV to host", Resource.DEVICE_TO_HOST, nbytes / hardware.device_to_host, nbytes, "bytes")
    written = tokens * _kv_bytes(spec, policy) * policy.kv.disk
    # Writing has a queue of its own beside reading; it is as slow as the disk writes.
    yield Term("KV to disk", Resource.HOST_COMPUTE, written / hardware.disk_write, written, "bytes")
    if policy.kv_bits < 16:
        numbers = float(tokens * spec.kv_numbers_per_token)
        yield Term("KV packed", Resource.COMPUTE, numbers / hardware.dequantize_numbers, numbers, "numbers")


def _step(spec: ModelSpec, hardware: HardwareProfile, policy: BlockPolicy, positions: float) -> Iterator[Term]:
    flops = float(policy.rows * spec.linear_flops_per_token)
    rate = min(DECODE_FLOPS, hardware.gemm_rate(spec.compute_dtype, policy.batch))
    yield Term("decode matrices", Resource.COMPUTE, flops / rate, flops, "FLOP")
    kept = policy.rows * positions
    nbytes = kept * _kv_bytes(spec, policy)
    away = nbytes * (1.0 - policy.kv.device)
    read = nbytes * policy.kv.disk
    yield Term("KV from disk", Resource.DISK, read / hardware.disk_read, read, "bytes")
    on_cpu = away if policy.host_attention else 0.0
    yield Term("attention on CPU", Resource.COMPUTE, on_cpu / hardware.host_attention_bytes, on_cpu, "bytes")
    moved = away - on_cpu
    yield Term("KV to device", Resource.HOST_TO_DEVICE, moved / hardware.host_to_device, moved, "bytes")
    read = kept * spec.kv_bytes_per_token() * (1.0 - on_cpu / nbytes)
    yield Term("decode attention", Resource.COMPUTE, read / hardware.attention_bytes, read, "bytes")
    if policy.kv_bits < 16:
        numbers = kept * spec.kv_numbers_per_token
        yield Term("KV expanded", Resource.COMPUTE, numbers / hardware.dequantize_numbers, numbers, "numbers")


def _kv_bytes(spec: ModelSpec, policy: BlockPolicy) -> float:
    """FlexGen packs keys and values alike, in groups of numbers of one token."""
    if policy.kv_bits == 16:
        return spec.kv_bytes_per_token()
    return packed_bytes(spec.kv_numbers_per_token, policy.kv_bits, QUANTIZATION_GROUP)
