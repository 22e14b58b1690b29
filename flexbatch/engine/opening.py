"""Puts an engine together: model, weights, KV arena and storage, from a checkpoint, a policy and the limits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from flexbatch.engine.checkpoint_map import ParameterSource, map_checkpoint
from flexbatch.engine.conversation import Conversation
from flexbatch.engine.engine import Constraint, Engine
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.last_layer import narrow
from flexbatch.engine.layer_store import Attended
from flexbatch.engine.linear_layers import is_linear, use_fastest_linears
from flexbatch.engine.micro_batch import install_stops
from flexbatch.engine.model import SteppedModel, build
from flexbatch.engine.packed_sources import block_sources, compress_sources, pack_sources, smaller_form
from flexbatch.engine.storage import HiddenStateParking, Storage
from flexbatch.engine.weights import StreamOptions, Weights
from flexbatch.errors import CapacityError, OutputError
from flexbatch.kernels import packed_attention
from flexbatch.memory.heap import Heap
from flexbatch.memory.library_pages import release_library_pages
from flexbatch.memory.packed_file import OnProgress
from flexbatch.memory.reader_choice import choose_reader
from flexbatch.memory.safetensors_header import TORCH_DTYPES, TensorEntry
from flexbatch.memory.tiers import TierBudget
from flexbatch.memory.transfer import OnEvent
from flexbatch.plan.attention_shape import attention_shape
from flexbatch.plan.memory_need import cache_form
from flexbatch.plan.model_spec import COMPRESSED, is_attended_packed
from flexbatch.plan.placement import place_slots
from flexbatch.plan.policy import Policy, Tier
from flexbatch.plan.rows_in_flight import GuessRoom
from flexbatch.plan.workload import column_slack

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and where its tensors lie. `where` names it in errors."""

    config: PreTrainedConfig
    entries: Mapping[str, TensorEntry]
    where: str


@dataclass(frozen=True)
class Limits:
    """Bytes of each tier that may be used, and the folder for what goes to disk.

    With `one_memory` device and host are both main memory: `device` limits their sum.
    """

    device: int = UNLIMITED
    host: int = UNLIMITED
    disk: int = UNLIMITED
    disk_folder: Path = Path()
    one_memory: bool = False

    def budgets(self) -> dict[Tier, TierBudget]:
        device = TierBudget(Tier.DEVICE, self.device)
        host = device if self.one_memory else TierBudget(Tier.HOST, self.host)
        return {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: TierBudget(Tier.DISK, self.disk)}


@dataclass(frozen=True)
class EngineOptions:
    """`span` is the most tokens of a row, prompt and completion, `own_span` the same without a shared prefix (0: not
    known); `padded_width` pads every prompt to it (0: not), which leaves prefixes unshared. `blocked_file_bytes`: how
    much a new file of weights in oneDNN's format may take where weights are streamed (None: not even an old one is
    used). `planned_bytes` of main memory is what the process takes as planned, where that is what the device has;
    `working_bytes` what calls take and give back between two stops at most, `prompts_bytes` of that only where prompts
    are among the calls; `most_slots`: for how many rows that was planned (0: as many as the policy
    has slots), with what `guesses` of theirs there is room for. `on_packing` is told how many bytes of a packed
    file's sources are done, and of how many."""

    span: int
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    padded_width: int = 0
    own_span: int = 0
    planned_bytes: int = UNLIMITED
    working_bytes: int = 64 << 20
    prompts_bytes: int = 0
    most_slots: int = 0
    guesses: GuessRoom = GuessRoom()
    reader: str = "auto"
    packed_folder: Path = Path()
    blocked_file_bytes: int | None = None
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    on_event: OnEvent | None = None
    on_packing: OnProgress | None = None


def compute_dtype(choice: str, stored: Mapping[str, TensorEntry], device: torch.device) -> torch.dtype:
    """The type that the maths runs in. `auto` is the type that most bytes are stored in; float16 becomes bfloat16 on a
    CPU, where float16 arithmetic is some ten times slower."""
    if choice != "auto":
        return DTYPES[choice]
    amounts: dict[str, int] = {}
    for entry in stored.values():
        amounts[entry.dtype] = amounts.get(entry.dtype, 0) + entry.nbytes
    common = TORCH_DTYPES[max(amounts, key=lambda name: amounts[name])]
    if common is torch.float16 and device.type == "cpu":
        return torch.bfloat16
    return common if common in DTYPES.values() else torch.float32


@dataclass(frozen=True)
class _Opened:
    """What every use of a model needs: its modules, their weights, and room for the rest."""

    stepped: SteppedModel
    weights: Weights
    storage: Storage
    heap: Heap

    def arena(self, policy: Policy, slots: int, span: int, slack: int) -> KVArena:
        counts = place_slots(self.stepped.num_layers, slots, policy.kv)
        form = cache_form(policy)
        return KVArena(counts, slots, span, slack, self.storage, form, self._attended(form))

    def _attended(self, bits: int) -> Attended:
        """How the decode batch's attention takes a cache of so many bits, or compressed."""
        if not self.stepped.merges_prefixes:
            return Attended.WHOLE
        if bits == COMPRESSED:
            return Attended.PACKED
        shape = attention_shape(self.stepped.model.config.to_dict())
        suits = self.stepped.lays_side_by_side and is_attended_packed(shape.head_sizes, bits)
        has_kernel = self.storage.device.type == "cpu" and packed_attention.is_available()
        return Attended.PACKED if suits and has_kernel else Attended.IN_PARTS


def open_engine(
    checkpoint: Checkpoint, policy: Policy, limits: Limits, vocabulary: Vocabulary, options: EngineOptions
) -> Engine:
    """An engine ready to run: residents loaded, the stream of the other weights under way."""
    opened = _open(checkpoint, policy, limits, options)
    opened.storage.touch_ahead(opened.heap.has_room)
    apart = opened.stepped.merges_prefixes and policy.prefix_sharing and not options.padded_width
    span = min(options.span, options.own_span or options.span) if apart else max(options.span, options.padded_width)
    return Engine(
        opened.stepped,
        opened.weights,
        opened.arena(policy, policy.slots, span, column_slack(span)),
        opened.storage,
        vocabulary,
        prefill_tokens=policy.prefill_tokens,
        shortest_part=policy.shortest_part,
        whole_prompts=policy.whole_prompts,
        padded_width=options.padded_width,
        host_attention=policy.host_attention,
        share_prefixes=policy.prefix_sharing and not options.padded_width,
        constraints=options.constraints,
        heap=opened.heap,
        prompts_bytes=options.prompts_bytes,
        most_slots=options.most_slots,
        guesses=options.guesses,
    )


def open_conversation(checkpoint: Checkpoint, policy: Policy, limits: Limits, options: EngineOptions) -> Conversation:
    """A conversation of at most `options.span` tokens, with its weights as `open_engine` has them."""
    opened = _open(checkpoint, policy, limits, options)
    return Conversation(opened.stepped, opened.weights, opened.arena(policy, 1, options.span, 0), opened.storage)


def _with_blocked_file(
    stepped: SteppedModel, sources: dict[str, ParameterSource], options: EngineOptions
) -> dict[str, ParameterSource]:
    """The sources with streamed weights laid out, if they can be: only who asks for it must have it."""
    most = options.blocked_file_bytes or 0
    try:
        return block_sources(stepped, sources, most, options.packed_folder, options.on_packing)
    except (CapacityError, OutputError) as error:
        if most >= UNLIMITED:
            raise
        logger.warning("Weights are streamed as they are stored: %s", error.message)
        return sources


def _open(checkpoint: Checkpoint, policy: Policy, limits: Limits, options: EngineOptions) -> _Opened:
    stepped = build(checkpoint.config, options.dtype)
    use_fastest_linears(stepped, options.dtype, options.device)
    sources = map_checkpoint(stepped.model, checkpoint.entries, checkpoint.where)
    integers = policy.compute == "int8"
    if policy.weight_bits < 16 or integers:
        form = smaller_form(policy.weight_bits, integers)
        sources = pack_sources(stepped, sources, form, options.packed_folder, options.on_packing)
    elif policy.compressed:
        sources = compress_sources(stepped, sources, options.packed_folder, options.on_packing)
    elif policy.weights.device < 1 and options.blocked_file_bytes is not None:
        sources = _with_blocked_file(stepped, sources, options)
    if stepped.lays_side_by_side:
        narrow(stepped.layer(stepped.num_layers - 1), is_linear)
    storage = Storage(options.device, limits.budgets(), limits.disk_folder)
    files = sorted({entry.file for source in sources.values() for entry in source.entries})
    reader = choose_reader(files, options.reader)
    stream = StreamOptions(reader, policy.prefetch_bytes, options.on_event)
    weights = Weights(stepped, sources, policy.weights, storage, stream)
    parking = HiddenStateParking(policy.hidden, storage) if policy.hidden.device < 1 else None
    # Only where the model's memory is the process's own.
    most = min(limits.device, options.planned_bytes) if limits.one_memory else UNLIMITED
    heap = Heap(most, options.working_bytes)
    install_stops(stepped, parking.park if parking is not None else None, heap.settle)
    if limits.one_memory:
        release_library_pages()
    return _Opened(stepped, weights, storage, heap)
