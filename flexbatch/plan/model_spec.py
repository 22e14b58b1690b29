"""What the plan knows of a model: sizes and arithmetic, taken from a Transformers config alone.

Parameter counts depend on code that only the model's class knows, so `flexbatch.engine.model_shapes.spec_from_config`
counts them on the meta device (no weight is read) and fills a `ModelSpec`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Group-wise quantisation: `QUANTIZATION_GROUP` weights share one scale and one minimum of two bytes each.
QUANTIZATION_GROUP = 32
GROUP_BYTES = 4

# "Bits" of weights for 8-bit arithmetic: a byte each, and a scale and a sum (4 bytes each) for every row.
INTEGERS = 0
INTEGER_ROW = 1024

# "Bits" of bfloat16 weights in a lossless copy: whole chunks of numbers, of those matrices that become smaller by it.
COMPRESSED = -1
COMPRESSED_CHUNK = 1 << 16
LARGEST_COMPRESSED = 0.9

# A compressed weight is expanded within the product where its inputs are a multiple of this
# (`kernels/float_tile_products.py`).
COMPRESSED_INPUTS = 2048

BFLOAT_BYTES = 2

# The KV cache is quantised in groups of at most 32 numbers, again with a scale and a minimum of two bytes.
LARGEST_KV_GROUP = 32

# A compressed cache names a head and a number of it in a byte each, and keeps so many numbers together
# (`kernels/compressed_states.py`).
MOST_HEADS, LARGEST_HEAD, CACHE_BLOCK = 256, 256, 64


@dataclass(frozen=True, slots=True)
class Mixture:
    """`experts` of which a token meets `chosen`, all with `parameters` in their matrices together."""

    experts: int
    chosen: int
    parameters: int

    @property
    def active_parameters(self) -> int:
        """Of the matrices that multiply one token."""
        return self.parameters * self.chosen // self.experts

    def rows(self, tokens: float) -> float:
        """Of a product with one expert's matrix, with so many tokens; an expert that no token meets makes none."""
        return max(1.0, tokens * self.chosen / self.experts)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Counts are numbers, not bytes.

    `parts` are needed one after the other (a small layer is one part), each with its tensors as (numbers, is a matrix)
    in the order of registration; matrices are what 8 and 4 bits pack. Norms of a layer of several parts are not here.
    `active_parameters` of the matrices multiply one token: fewer than all where experts are chosen, as `mixture` says.
    `query_size` is query heads times head size, `kv_size` the numbers that the cache keeps for one token (keys and
    values of all KV heads, `head_sizes` each), `window` the attended positions (0: all). Where latent vectors are
    cached (DeepSeek-V2, arXiv 2405.04434, section 2.1), `expanded_size` numbers are made of a position's before
    attention, with `expansion_parameters`.
    """

    parts: tuple[tuple[tuple[int, bool], ...], ...]
    active_parameters: int
    query_size: int
    kv_size: int
    mixture: Mixture | None = None
    window: int = 0
    head_sizes: tuple[int, int] = (LARGEST_KV_GROUP, LARGEST_KV_GROUP)
    expanded_size: int = 0
    expansion_parameters: int = 0

    def kv_bytes(self, bits: int, number_bytes: int) -> int:
        """Cache bytes of one token; `number_bytes` is the size of a number that is not packed."""
        if bits == 16:
            return self.kv_size * number_bytes
        heads = self.kv_size // sum(self.head_sizes)
        keys, values = self.head_sizes
        if bits == COMPRESSED:
            return compressed_kv_bytes(heads, keys) + compressed_kv_bytes(heads, values)
        return heads * (packed_head_bytes(keys, key_bits(bits)) + packed_head_bytes(values, bits))

    @property
    def tensors(self) -> tuple[tuple[int, bool], ...]:
        return tuple(tensor for part in self.parts for tensor in part)

    @property
    def parameters(self) -> int:
        return sum(numbers for numbers, _ in self.tensors)

    @property
    def matrix_parameters(self) -> int:
        return sum(numbers for numbers, is_matrix in self.tensors if is_matrix)


@dataclass(frozen=True, slots=True)
class OutsideSpec:
    """A module outside the layers whose weights are streamed like a layer's: token embedding, positions, head.

    `shared` says that its weights are another module's (a tied head): they are stored once. `last` says that it comes
    after the layers.
    """

    name: str
    parameters: int
    shared: bool = False
    last: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model. `parameters` is what `sum(p.numel() for p in model.parameters())` gives, to the unit.

    `small_parameters` (norms and projections outside the layers) stay on the device; `head_parameters` multiply a
    hidden state once for each output row (an embedding only gathers). `stored_dtype` is the checkpoint's number format,
    `compute_dtype` the one that the maths runs in. `hidden_size` is the width between layers, `intermediate_size` the
    widest inner activation. `side_by_side` says that a pass's prompts and decode rows go through the matrices together.

    Of the bytes of the layers' matrices in bfloat16 a lossless copy takes `compressed_share` (1: there is none to be
    had); `has_compressed_file` says that it was made before.
    """

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    outside: tuple[OutsideSpec, ...]
    small_parameters: int
    head_parameters: int
    side_by_side: bool = False
    stored_dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    compressed_share: float = 1.0
    has_compressed_file: bool = False

    @property
    def dtype_bytes(self) -> int:
        """Size of a stored parameter."""
        return 4 if self.stored_dtype == "float32" else 2

    @cached_property
    def layer_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def outside_parameters(self) -> int:
        """Parameters of the streamed modules outside the layers, tied ones once."""
        return sum(module.parameters for module in self.outside if not module.shared)

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.outside_parameters + self.small_parameters

    @cached_property
    def kv_numbers_per_token(self) -> int:
        return sum(layer.kv_size for layer in self.layers)

    def tensor_bytes(self, numbers: int, is_matrix: bool, bits: int) -> int:
        """Bytes of a layer's tensor: a matrix packed to `bits` (16: as stored), anything else as stored."""
        if bits == 16 or not is_matrix:
            return numbers * self.dtype_bytes
        if bits == COMPRESSED:
            records = round(BFLOAT_BYTES * -(-numbers // COMPRESSED_CHUNK) * COMPRESSED_CHUNK * self.compressed_share)
            return records if records <= LARGEST_COMPRESSED * BFLOAT_BYTES * numbers else numbers * self.dtype_bytes
        if bits == INTEGERS:
            return numbers + 8 * -(-numbers // INTEGER_ROW)
        return packed_bytes(numbers, bits, QUANTIZATION_GROUP)

    def layer_bytes(self, layer: LayerSpec, bits: int) -> int:
        return sum(self.tensor_bytes(numbers, is_matrix, bits) for numbers, is_matrix in layer.tensors)

    def weight_bytes(self, bits: int = 16) -> int:
        """Stored bytes of the whole model; modules outside the layers are never packed."""
        return sum(map(sum, self.stop_bytes(bits))) + self.small_parameters * self.dtype_bytes

    def stop_bytes(self, bits: int = 16) -> tuple[tuple[int, ...], ...]:
        """Stored bytes of every streamable tensor, grouped by the moment at which it is needed, in the order of use.

        A tied head appears once, where its weights come first.
        """
        known = self._stop_bytes
        if bits not in known:
            kinds = {layer: self._layer_stops(layer, bits) for layer in set(self.layers)}
            own = [module for module in self.outside if not module.shared]
            first = [(module.parameters * self.dtype_bytes,) for module in own if not module.last]
            last = [(module.parameters * self.dtype_bytes,) for module in own if module.last]
            known[bits] = (*first, *(part for layer in self.layers for part in kinds[layer]), *last)
        return known[bits]

    @cached_property
    def stop_uses(self) -> tuple[tuple[int, ...], ...]:
        """For every tensor of `stop_bytes`, at how many places of a pass it is used."""
        own = [module for module in self.outside if not module.shared]
        tied = [module.parameters for module in self.outside if module.shared]
        uses = {id(module): (1 + tied.count(module.parameters),) for module in own}
        first = [uses[id(module)] for module in own if not module.last]
        last = [uses[id(module)] for module in own if module.last]
        return (*first, *((1,) * len(part) for layer in self.layers for part in layer.parts), *last)

    def _layer_stops(self, layer: LayerSpec, bits: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self.tensor_bytes(*tensor, bits) for tensor in part) for part in layer.parts)

    @cached_property
    def remembered(self) -> dict[Hashable, Any]:
        """What was worked out from the sizes of all tensors before, by what it was worked out for."""
        return {}

    @cached_property
    def _stop_bytes(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        return {}

    def kv_bytes_per_token(self, bits: int = 16, number_bytes: int = 2) -> float:
        """Cache bytes that one token needs over all layers. `number_bytes` is the size of an uncompressed entry."""
        return float(sum(layer.kv_bytes(bits, number_bytes) for layer in self.layers))

    @cached_property
    def linear_flops_per_token(self) -> int:
        """Two for each parameter that multiplies a token, head excluded."""
        return 2 * sum(layer.active_parameters for layer in self.layers)

    @cached_property
    def mixtures(self) -> Mapping[Mixture, int]:
        """Those of the layers, and how many layers have each."""
        return Counter(layer.mixture for layer in self.layers if layer.mixture is not None)

    @property
    def suits_compressed_products(self) -> bool:
        """Whether a product expands every matrix while it multiplies, where they are compressed. What latent keys and
        values have for inputs is not known here."""
        if any(layer.expansion_parameters for layer in self.layers):
            return False
        inputs = {self.hidden_size, self.intermediate_size, *(layer.query_size for layer in self.layers)}
        return all(size % COMPRESSED_INPUTS == 0 for size in inputs)

    @property
    def activation_numbers(self) -> int:
        """Numbers that one token's way through all layers reads and writes between the matrix products."""
        return len(self.layers) * layer_activations(self.hidden_size, self.intermediate_size)

    @cached_property
    def largest_layer_parameters(self) -> int:
        return max(layer.parameters for layer in self.layers)

    @cached_property
    def expanded_parameters(self) -> int:
        """Numbers of the matrices that are expanded at a time: those of the largest part of a layer."""
        parts = {part for kind in set(self.layers) for part in kind.parts}
        return max(sum(numbers for numbers, is_matrix in part if is_matrix) for part in parts)

    @cached_property
    def head_sizes(self) -> frozenset[tuple[int, int]]:
        """Those of keys and values in the layers."""
        return frozenset(layer.head_sizes for layer in self.layers)

    @property
    def divides_layers(self) -> bool:
        return any(len(layer.parts) > 1 for layer in set(self.layers))

    @cached_property
    def packed_numbers(self) -> int:
        """Numbers that 8 or 4 bits pack, and that are expanded once a pass."""
        return sum(layer.matrix_parameters for layer in self.layers)

    def attended_numbers(self, positions: float) -> float:
        """Query size times positions that one token sees, summed over all layers."""
        return sum(size * min(positions, window or positions) for window, size in self._query_sizes.items())

    @cached_property
    def _query_sizes(self) -> Mapping[int, int]:
        """Query sizes summed over the layers that have the same window."""
        sizes: Counter[int] = Counter()
        for layer in self.layers:
            sizes[layer.window] += layer.query_size
        return sizes

    def attention_flops(self, queries: float, keys: float) -> float:
        """FLOPs of scores and weighted sum for `queries` tokens that see `keys` positions, over all layers."""
        return 4.0 * queries * self.attended_numbers(keys)


def layer_activations(hidden_size: int, intermediate_size: int) -> int:
    """Numbers touched in one layer: two norms, two residuals, the heads' copies; the activation function."""
    return 12 * hidden_size + 2 * intermediate_size


def packed_bytes(numbers: int, bits: int, group: int) -> int:
    """Bytes of `numbers` packed to `bits` with a scale and a minimum for each group."""
    return numbers * bits // 8 + -(-numbers // group) * GROUP_BYTES


def key_bits(kv_bits: int) -> int:
    """Bits of keys where values have `kv_bits`: never below 8, because a few channels of the keys of many models are
    far larger than the others, and every score depends on them (docs/benchmarks.md, Quality)."""
    return max(kv_bits, 8)


def compressed_head_bytes(head_size: int) -> int:
    """Bytes of one token's keys (or values) of one head where they are compressed without loss, but for exceptions: for
    each number a sign and mantissa of a byte and a code of four bits, and one exponent."""
    return head_size + head_size // 2 + 1


def compressed_exceptions(numbers: int) -> int:
    """How many exceptions there is room for in a token's keys (or values) of so many numbers: of normal ones, one in
    six thousand is one; beside a channel that is a hundred times as large as the others, one in two hundred."""
    return min(255, max(16, numbers // 64))


def compressed_kv_bytes(heads: int, head_size: int) -> int:
    """Bytes of one token's keys (or values) of a layer, compressed without loss: an exception takes three, and their
    count one."""
    return heads * compressed_head_bytes(head_size) + 1 + 3 * compressed_exceptions(heads * head_size)


def kv_group_size(head_size: int) -> int:
    """Numbers of one head that share a scale and a minimum: the largest even divisor of the head up to 32, so that
    nothing is filled up; 32 where all of these are small."""
    divisors = [size for size in range(2, LARGEST_KV_GROUP + 1, 2) if head_size % size == 0]
    best = max(divisors, default=0)
    return best if best >= min(head_size, LARGEST_KV_GROUP // 4) else LARGEST_KV_GROUP


def is_attended_packed(head_sizes: tuple[int, int], bits: int) -> bool:
    """Whether a CPU's decode attention can read a cache of so many bits as it is kept: in whole groups of numbers, and
    of 4 bits in pairs of groups, whose numbers share bytes."""
    values = LARGEST_KV_GROUP if bits == 8 else 2 * LARGEST_KV_GROUP
    return bits in (8, 4) and head_sizes[0] % LARGEST_KV_GROUP == 0 and head_sizes[1] % values == 0


def is_compressible(heads: int, head_sizes: tuple[int, int]) -> bool:
    """Whether keys and values of so many heads can be kept compressed without loss."""
    suit = (0 < size <= LARGEST_HEAD and size % CACHE_BLOCK == 0 for size in head_sizes)
    return 0 < heads <= MOST_HEADS and all(suit)


def packed_head_bytes(head_size: int, bits: int) -> int:
    """Bytes of one token's keys (or values) of one head in `bits`."""
    groups = -(-head_size // kv_group_size(head_size))
    return groups * (kv_group_size(head_size) * bits // 8 + GROUP_BYTES)
