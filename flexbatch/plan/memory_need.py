"""How many bytes a policy needs on each tier, item by item: what admission compares with the limits."""

from __future__ import annotations

import math
from functools import lru_cache

from flexbatch.plan.admission import most_tokens
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.kv_rooms import (
    OUTGOING_BLOCKS,
    PACKED_PARTS,
    PAGE,
    PARTS,
    TAIL_COLUMNS,
    brought_at_once,
    reading_bytes,
)
from flexbatch.plan.model_spec import COMPRESSED, INTEGERS, ModelSpec, is_attended_packed, is_compressible
from flexbatch.plan.need import Need, peak_bytes
from flexbatch.plan.placement import place_slots
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.rows_in_flight import GUESSES, MOST_PACE, guessed_tokens, hastened, most_rows
from flexbatch.plan.weight_need import number_bytes, weight_form, weight_needs
from flexbatch.plan.workload import Workload, columns, span

# A prefill micro-batch has about this many padded tokens (the engine packs them so): enough for the matrix products to
# run at full rate, few enough that activations stay small.
MICRO_BATCH_TOKENS = 2048

# A call of several side by side has room for the decode batch beside a full micro-batch: alone it would read all
# weights again.
TOGETHER_TOKENS = MICRO_BATCH_TOKENS * 9 // 8

# Logits are made for no more positions at once than fit here: as computed, in float32, and one copy to mask in. Some 90
# positions of the largest vocabularies (BLOOM's), enough for the head's matrix product to run at full rate.
LOGITS_BYTES = 256 << 20
LOGIT_BYTES = 12


def logits_at_once(vocab_size: int) -> int:
    """How many positions' logits are made at once."""
    return max(1, LOGITS_BYTES // (vocab_size * LOGIT_BYTES))


GUESS_COPIES = 16 << 20  # of some rows' keys and values, and of logits, where there are guesses
FEWEST_LOGITS = 32  # at once, of rows with guesses: each time all of the head's matrix is read


def cache_form(policy: Policy) -> int:
    """The bits that keys and values are kept and moved in."""
    return COMPRESSED if policy.compressed_cache else policy.kv_bits


def kv_units(spec: ModelSpec, policy: Policy) -> dict[Tier, int]:
    """(slot, layer) units of the KV cache on each tier, exactly as placement cuts them."""
    return dict(_placed_units(len(spec.layers), policy.slots, policy.kv))


@lru_cache(maxsize=4096)
def _placed_units(layers: int, slots: int, shares: Shares) -> tuple[tuple[Tier, int], ...]:
    counts = place_slots(layers, slots, shares)
    device, host = sum(count[0] for count in counts), sum(count[1] for count in counts)
    return (Tier.DEVICE, device), (Tier.HOST, host), (Tier.DISK, layers * slots - device - host)


def most_on_disk(spec: ModelSpec, policy: Policy) -> int:
    """Slots that the layer with the most of them has on disk."""
    return _most_on_disk(len(spec.layers), policy.slots, policy.kv)


@lru_cache(maxsize=4096)
def _most_on_disk(layers: int, slots: int, shares: Shares) -> int:
    return slots - min(sum(count) for count in place_slots(layers, slots, shares))


def kv_unit_bytes(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """Bytes of one slot of one layer, all columns."""
    return math.ceil(columns(workload.as_run(policy.prefix_sharing)) * _kv_layer_bytes(spec, policy))


def kv_block_bytes(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """The same on disk, where columns do not move."""
    pages = PAGE * (PARTS if cache_form(policy) == 16 else PACKED_PARTS)
    return math.ceil(span(workload.as_run(policy.prefix_sharing)) * _kv_layer_bytes(spec, policy)) + pages


def _kv_layer_bytes(spec: ModelSpec, policy: Policy) -> float:
    """Of a token in one layer."""
    return spec.kv_bytes_per_token(cache_form(policy), number_bytes(spec)) / len(spec.layers)


def attends_packed(spec: ModelSpec, hardware: HardwareProfile, policy: Policy) -> bool:
    """Whether decode attention reads a packed or compressed cache as it is kept."""
    if policy.compressed_cache:
        return True
    if policy.kv_bits == 16 or not (spec.side_by_side and hardware.packed_attention_numbers):
        return False
    return all(is_attended_packed(sizes, policy.kv_bits) for sizes in spec.head_sizes)


def may_compress_cache(spec: ModelSpec, hardware: HardwareProfile) -> bool:
    """Whether keys and values can be kept in fewer bytes without loss: bfloat16 by a CPU whose attention reads them."""
    can_be = spec.side_by_side and spec.compute_dtype == "bfloat16" and hardware.compressed_attention_numbers > 0
    return can_be and all(
        is_compressible(layer.kv_size // sum(layer.head_sizes), layer.head_sizes) for layer in spec.layers
    )


def is_gathered(spec: ModelSpec, policy: Policy) -> bool:
    """Whether attention, which is not ours, is to find all tiers' keys and values in one place, on the device."""
    return policy.kv.device < 1.0 - 1e-9 and cache_form(policy) == 16 and not spec.side_by_side


def needs(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> tuple[Need, ...]:
    """Every use of every tier at the job's peak."""
    workload = workload.as_run(policy.prefix_sharing)
    items = [
        Need("process", Tier.DEVICE, hardware.process_bytes),
        *weight_needs(spec, hardware, policy),
        *_kv_needs(spec, hardware, workload, policy),
        *_activation_needs(spec, workload, policy, *_joining(spec, workload, policy)),
    ]
    return tuple(item for item in items if item.nbytes > 0)


# Of what only passes with prompts need, this part can be had by others later: a heap keeps some of what was freed.
FOUND_AGAIN = 0.9


def prompts_bytes(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """Bytes of the device that are free once passes have no prompts any more."""
    workload = workload.as_run(policy.prefix_sharing)
    joining = _joining(spec, workload, policy)
    busy, quiet = (peak_bytes(_activation_needs(spec, workload, policy, *each)) for each in (joining, (0, 0)))
    return int(FOUND_AGAIN * (busy[Tier.DEVICE] - quiet[Tier.DEVICE]))


def _kv_needs(spec: ModelSpec, hardware: HardwareProfile, workload: Workload, policy: Policy) -> list[Need]:
    unit, counts = kv_unit_bytes(spec, workload, policy), kv_units(spec, policy)
    plain = math.ceil(span(workload) * spec.kv_bytes_per_token(16, number_bytes(spec)) / len(spec.layers))
    block = kv_block_bytes(spec, workload, policy)
    items = [Need("KV cache", tier, count * (block if tier is Tier.DISK else unit)) for tier, count in counts.items()]
    if cache_form(policy) < 16:
        # Wherever it is, it is expanded straight into one room on the device, which all layers use in turn: of some
        # rows at a time, of all for attention that is not ours, or of the one whose prompt enters in parts.
        rows = min(policy.slots, brought_at_once(plain)) if spec.side_by_side else policy.slots
        rows = 1 if attends_packed(spec, hardware, policy) else rows
        items.append(Need("KV of one layer, expanded", Tier.DEVICE, rows * plain))
    elif is_gathered(spec, policy):
        items.append(Need("KV of one layer, gathered", Tier.DEVICE, policy.slots * unit))
    elif hardware.has_accelerator and policy.kv.device < 1.0 and not policy.host_attention:
        # Some rows are attended to while the next ones come.
        items.append(Need("KV on its way", Tier.DEVICE, min(policy.slots, 2 * brought_at_once(plain)) * plain))
    if policy.kv.disk > 0:
        tier = Tier.HOST if hardware.has_accelerator else Tier.DEVICE
        items.append(Need("KV from disk", tier, _from_disk_bytes(spec, policy, counts[Tier.DISK], block, workload)))
    if made := max(layer.expanded_size for layer in spec.layers):
        positions = max(policy.slots * span(workload), MICRO_BATCH_TOKENS)
        items.append(
            Need("keys and values of one layer, from latent ones", Tier.DEVICE, positions * made * number_bytes(spec))
        )
    if workload.shared_tokens:
        tokens = workload.groups_at_once(most_rows(workload, policy)) * workload.shared_tokens
        nbytes = tokens * spec.kv_bytes_per_token(16, number_bytes(spec))
        items.append(Need("KV of shared prefixes", Tier.DEVICE, math.ceil(nbytes)))
    return items


def _from_disk_bytes(spec: ModelSpec, policy: Policy, units: int, block: int, workload: Workload) -> int:
    """What is in memory of a cache on disk: rooms to read a layer's slots into, blocks to be written, in each layer the
    slot of a row that enters in parts, and the newest columns."""
    reading = reading_bytes(most_on_disk(spec, policy), block)
    blocks = OUTGOING_BLOCKS + (0 if policy.whole_prompts else min(units, len(spec.layers)))
    return reading + blocks * block + math.ceil(units * block * TAIL_COLUMNS / span(workload))


def _activation_needs(spec: ModelSpec, workload: Workload, policy: Policy, joining: int, tokens: int) -> list[Need]:
    """Of passes with so many prompts, of so many tokens without what they share."""
    size = number_bytes(spec)
    longest = float(workload.longest_kept)
    in_slots, guesses = most_rows(workload, policy), guessed_tokens(spec, workload, policy)
    rows = in_slots + guesses
    prompts = tokens + math.ceil(workload.shared_tokens) if tokens else 0
    if spec.divides_layers:  # micro-batches go through a layer one after the other, but side by side through its parts
        at_once = prompts + rows
    elif spec.side_by_side:
        at_once = max(rows, min(prompts + rows, max(TOGETHER_TOKENS, math.ceil(longest))))
    else:
        at_once = max(rows, min(prompts, max(MICRO_BATCH_TOKENS, math.ceil(longest))))
    query = max(layer.query_size for layer in spec.layers)
    inner = (2 * spec.intermediate_size + 4 * spec.hidden_size + 4 * query) * size
    if spec.mixtures:  # an expert's tokens and what it makes of them, in float32 twice, beside the sums
        inner += 6 * spec.hidden_size * size
    if cache_form(policy) < 16:  # a prompt's keys and values as made, as packed, and as attention sees them
        inner += 2 * max(layer.kv_size for layer in spec.layers) * size
    if weight_form(policy) == INTEGERS:  # the widest product as int32 before it is scaled
        inner += 2 * spec.intermediate_size
    attended = policy.slots * span(workload) * (1 + GUESSES if guesses else 1)
    copies = GUESS_COPIES if guesses else 0
    waiting = (tokens + rows) * spec.hidden_size * size
    logits = _logits(spec, in_slots, guesses, joining) * spec.vocab_size * (size + 4)
    share = policy.hidden
    return [
        Need("activations", Tier.DEVICE, at_once * inner + attended * 8 + copies),
        Need("logits", Tier.DEVICE, logits),
        Need("hidden states", Tier.DEVICE, math.ceil(waiting * (share.device if share.device < 1 else 1.0))),
        Need("hidden states", Tier.HOST, math.ceil(waiting * share.host)),
        Need("hidden states", Tier.DISK, math.ceil(waiting * share.disk)),
    ]


def logits_of_guesses(spec: ModelSpec, workload: Workload, policy: Policy) -> int:
    """How many positions' logits are made at once of rows with guesses."""
    workload = workload.as_run(policy.prefix_sharing)
    joining, _ = _joining(spec, workload, policy)
    return _logits(spec, most_rows(workload, policy), guessed_tokens(spec, workload, policy), joining)


def _logits(spec: ModelSpec, rows: int, guesses: int, joining: int) -> int:
    fewest = min(FEWEST_LOGITS, rows + guesses)
    return min(max(rows + joining, fewest), logits_at_once(spec.vocab_size))


def _joining(spec: ModelSpec, workload: Workload, policy: Policy) -> tuple[int, int]:
    """The most prompts that enter a pass, and their tokens. What cannot be split has saved up to its length."""
    rows, longest = most_rows(workload, policy), float(workload.longest_kept)
    pace = MOST_PACE if guessed_tokens(spec, workload, policy) else 1.0
    budget = hastened(policy.prefill_tokens, pace)
    if policy.shortest_part and not (policy.whole_prompts or workload.shared_tokens):
        tokens = most_tokens(math.ceil(longest), budget, policy.shortest_part)
        return min(rows, 1 + math.ceil(tokens / longest)), min(tokens, math.ceil(policy.slots * longest))
    is_even = policy.whole_prompts and budget == policy.prefill_tokens
    saved = longest if policy.shortest_part and not is_even else 0.0
    joining = min(rows, max(1, int((budget + saved) / workload.own_tokens + 1e-9)))
    return joining, math.ceil(min(joining, policy.slots) * longest)  # more than slots are short
