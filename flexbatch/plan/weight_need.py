"""How many bytes a policy's weights need: as they are kept, on their way, and expanded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.model_spec import COMPRESSED, INTEGERS, ModelSpec
from flexbatch.plan.need import Need
from flexbatch.plan.placement import TIERS, Numbers, place_numbers, stream_bytes
from flexbatch.plan.policy import Policy, Shares, Tier


def number_bytes(spec: ModelSpec) -> int:
    """Size of a number in the compute type."""
    return 4 if spec.compute_dtype == "float32" else 2


def weight_form(policy: Policy) -> int:
    """The bits that weights are kept and moved in."""
    if policy.compressed:
        return COMPRESSED
    return INTEGERS if policy.compute == "int8" else policy.weight_bits


def gemm_format(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> str:
    """What of `hardware.gemm` the products with the decoder's matrices are."""
    if policy.compute == "int8":
        return "int8"
    within = weight_form(policy) == COMPRESSED and "compressed" in hardware.gemm and not spec.mixtures
    return "compressed" if within and spec.suits_compressed_products else spec.compute_dtype


def streamable_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes that the shares of `policy.weights` cut up: layers, embeddings and head, as stored."""
    key = ("streamable", weight_form(policy))
    if key not in spec.remembered:
        spec.remembered[key] = sum(map(sum, spec.stop_bytes(weight_form(policy))))
    return spec.remembered[key]  # type: ignore[no-any-return]


def tied_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes of weights that a pass uses at several places."""
    sizes, uses = spec.stop_bytes(weight_form(policy)), spec.stop_uses
    each = zip((size for stop in sizes for size in stop), (count for stop in uses for count in stop), strict=True)
    return sum(size for size, count in each if count > 1)


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """Bytes of weights exactly as placement puts them: on the device, on the host, the most that one stop streams, and
    those of tied weights that a pass streams again."""

    device: int
    host: int
    most: int
    again: int


def held_weights(spec: ModelSpec, policy: Policy) -> HeldWeights:
    key = ("held", weight_form(policy), policy.weights)
    if key not in spec.remembered:
        spec.remembered[key] = _held_weights(spec.stop_bytes(weight_form(policy)), spec.stop_uses, policy.weights)
    return spec.remembered[key]  # type: ignore[no-any-return]


def _held_weights(sizes: tuple[tuple[int, ...], ...], uses: tuple[tuple[int, ...], ...], shares: Shares) -> HeldWeights:
    (each, firsts), (times, _) = _flat(sizes), _flat(uses)
    placed = place_numbers(each, times, shares)
    device, host, _ = (int(each[placed == number].sum()) for number in range(len(TIERS)))
    streamed = np.where(placed == TIERS.index(Tier.DEVICE), 0, each)
    most, again = np.add.reduceat(streamed, firsts).max(), (streamed * (times - 1)).sum()
    return HeldWeights(device, host, int(most), int(again))


@lru_cache(maxsize=64)
def _flat(stops: tuple[tuple[int, ...], ...]) -> tuple[Numbers, Numbers]:
    """All stops' numbers in one row, and where those of each stop begin."""
    starts = list(accumulate((len(stop) for stop in stops), initial=0))
    return np.array([number for stop in stops for number in stop]), np.array(starts[:-1])


def weight_needs(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> list[Need]:
    """What the weights need, resident and on their way."""
    held = held_weights(spec, policy)
    return [
        Need("small weights", Tier.DEVICE, spec.small_parameters * number_bytes(spec)),
        Need("resident weights", Tier.DEVICE, held.device),
        Need("weight stream", Tier.DEVICE, stream_bytes(held.most, policy.prefetch_bytes)),
        Need("one layer expanded", Tier.DEVICE, expanded_bytes(spec, hardware, policy)),
        Need("weights", Tier.HOST, held.host),
    ]


def expanded_bytes(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> int:
    """What of a layer is in the compute type at a time, where it is kept in another: the matrices of its largest part,
    or all of it, where it is converted on its way; nothing where products expand what they multiply."""
    form = weight_form(policy)
    if form == INTEGERS or (form == 16 and spec.stored_dtype == spec.compute_dtype):
        return 0
    if gemm_format(spec, hardware, policy) == "compressed":
        return 0
    numbers = spec.largest_layer_parameters if form == 16 else spec.expanded_parameters
    return numbers * number_bytes(spec)
