"""The model's weights: some resident on the device, the others streamed past, stop after stop, pass after pass."""

from __future__ import annotations

import time
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from flexbatch.engine.checkpoint_map import ParameterSource, parameter
from flexbatch.engine.linear_layers import laid_out_for
from flexbatch.engine.model import SteppedModel, Stop
from flexbatch.engine.parameter_slots import Slot, parameter_slots, place_sources, resident_bytes
from flexbatch.engine.storage import Storage
from flexbatch.memory.direct_io import PAGE, AlignedBuffer, Reader
from flexbatch.memory.safetensors_header import TORCH_DTYPES, TensorEntry
from flexbatch.memory.transfer import NO_STATISTICS, OnEvent, StreamStatistics, StreamTensor, StreamUnit, WeightStream
from flexbatch.plan.placement import kept_weights, stream_bytes
from flexbatch.plan.policy import Shares, Tier


@dataclass(frozen=True)
class StreamOptions:
    """How streamed weights travel. `prefetch_bytes` 0 asks for `placement.stream_bytes`."""

    reader: Reader
    prefetch_bytes: int = 0
    on_event: OnEvent | None = None


def in_order_of_use(order: Sequence[str], position: int, name: str, paths: Mapping[str, tuple[int, str]]) -> list[str]:
    """`order` with the stop `name` at `position` instead of later; where both it and the stop that was expected there
    are parts of a layer (`paths` says of which, and which), so are their likes in all other layers."""
    expected, moved = order[position], [each for each in order if each != name]
    moved.insert(position, name)
    if name not in paths or expected not in paths or paths[name][0] != paths[expected][0]:
        return moved
    streamed = {paths[each]: each for each in order if each in paths}
    (layer, path), (_, other) = paths[name], paths[expected]
    for later in {number for number, _ in streamed} - {layer}:
        mine, theirs = streamed.get((later, path)), streamed.get((later, other))
        if mine is not None and theirs is not None and moved.index(mine) > moved.index(theirs):
            moved.remove(mine)
            moved.insert(moved.index(theirs), mine)
    return moved


@dataclass(frozen=True)
class Kept:
    """A weight whose `tensors` (by name) were copied to the device; `tier` is where they came from."""

    slot: Slot
    tier: Tier
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Keeping:
    """Weights that stay on the device once rows have left it. `order` is that of the stops without them, `room` the
    bytes that are free still, `chosen` the sources to copy in this pass."""

    order: tuple[str, ...] = ()
    room: int = 0
    chosen: set[str] = field(default_factory=set)
    copied: dict[str, Kept] = field(default_factory=dict)


class Weights:
    """Supplies a stop's weights for as long as the walk is at it (`ready`)."""

    def __init__(
        self,
        stepped: SteppedModel,
        sources: Mapping[str, ParameterSource],
        shares: Shares,
        storage: Storage,
        options: StreamOptions,
    ) -> None:
        self._stepped, self._storage, self._options = stepped, storage, options
        self._device = storage.device
        self._slots = parameter_slots(stepped, sources, self._device)
        self._uses = Counter(slot.source.name for slots in self._slots.values() for slot in slots)
        self.tiers = place_sources(stepped.stops, self._slots, shares)
        self._host: dict[str, torch.Tensor] = {}
        self._resident: dict[str, nn.Parameter] = {}
        self._packed: dict[str, torch.Tensor] = {}
        self._load_residents(sources)
        self._order = [stop.name for stop in stepped.stops if self._streamed(stop.name)]
        self._paths = stepped.paths_in_layers()
        self._position, self._past = 0, NO_STATISTICS
        self._stream = self._open_stream() if self._order else None
        self._keeping = Keeping()

    @contextmanager
    def ready(self, stop: Stop) -> Iterator[None]:
        """The stop's weights are in its module inside this context."""
        streamed, packed = self._streamed(stop.name), self._packed_slots(stop.name)
        tensors = ChainMap(dict(self._acquire(stop.name)), self._packed) if streamed else self._packed
        started = time.perf_counter()
        try:
            for slot in (*streamed, *packed):
                slot.source.bind(slot.place, tensors, self._stepped.model)
            for slot in (*streamed, *packed):
                slot.source.bound()
            for slot in streamed:
                if slot.source.name in self._keeping.chosen and slot.source.name not in self._keeping.copied:
                    self._copy(slot, tensors)
            started = time.perf_counter()
            yield
        finally:
            if self._options.on_event is not None:
                self._options.on_event("compute", stop.name, started, time.perf_counter(), 0)
            for slot in (*streamed, *packed):
                slot.source.unbind(slot.place)
            if streamed and self._stream is not None:
                self._stream.release(stop.name)

    @property
    def are_streamed(self) -> bool:
        return self._stream is not None

    def statistics(self) -> StreamStatistics:
        return self._past + self._stream.statistics() if self._stream is not None else self._past

    def rewind(self) -> None:
        """Begins anew, after a pass that was given up on its way."""
        if self._stream is not None and self._position:
            self._position = 0
            self._reopen()

    def keep(self, nbytes: int, passes: int) -> None:
        """Between two passes: `nbytes` more of the device are free for the last `passes` passes. Streamed weights are
        copied there on their way, and from the pass after that on they are there."""
        keeping = self._keeping
        keeping.order = keeping.order or tuple(self._order)
        keeping.room += nbytes
        if keeping.chosen:
            self._make_kept()
        if self._stream is None or not keeping.room:
            return
        slots = [slot for stop in self._order for slot in self._streamed(stop)]
        sizes = {slot.source.name: resident_bytes(slot) for slot in slots if self._uses[slot.source.name] == 1}
        keeping.chosen = set(kept_weights(sizes, keeping.room, passes, self._stream.ring_bytes))
        keeping.room -= sum(sizes[name] for name in keeping.chosen)

    def forget(self) -> None:
        """Between two runs: what was kept is streamed again."""
        for name, kept in self._keeping.copied.items():
            self._storage.budgets[Tier.DEVICE].release(sum(copy.nbytes for copy in kept.tensors.values()), "weights")
            self.tiers[name] = kept.tier
            kept.slot.source.unbind(kept.slot.place)
            for entry in kept.tensors:
                self._packed.pop(entry, None)
        self._order, self._keeping = list(self._keeping.order or self._order), Keeping()
        self._reopen()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _streamed(self, stop: str) -> list[Slot]:
        return [slot for slot in self._slots.get(stop, ()) if self.tiers[slot.source.name] is not Tier.DEVICE]

    def _packed_slots(self, stop: str) -> list[Slot]:
        """Resident weights that are kept packed and expanded for each pass."""
        return [
            slot
            for slot in self._slots.get(stop, ())
            if slot.source.stays_packed and self.tiers[slot.source.name] is Tier.DEVICE
        ]

    def _acquire(self, name: str) -> Mapping[str, torch.Tensor]:
        """The next unit. Stops are registered in nearly the order of use; the first pass shows where they are not."""
        assert self._stream is not None
        if self._order[self._position] != name:
            self._order = in_order_of_use(self._order, self._position, name, self._paths)
            self._reopen()
        self._position = (self._position + 1) % len(self._order)
        return self._stream.acquire(name)

    def _copy(self, slot: Slot, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps the weight that is bound to the slot: what it is made from, where it stays packed, else itself."""
        name, value = slot.source.name, slot.place.module._parameters[slot.place.name]
        assert value is not None
        given = {entry.name: tensors[entry.name] for entry in slot.source.entries}
        own = {
            each: self._storage.zeros(Tier.DEVICE, tuple(tensor.shape), tensor.dtype, "weights").copy_(tensor)
            for each, tensor in (given if slot.source.stays_packed else {name: value.detach()}).items()
        }
        self._keeping.copied[name] = Kept(slot, self.tiers[name], own)

    def _make_kept(self) -> None:
        """Makes residents of the weights that were copied."""
        keeping = self._keeping
        for name in keeping.chosen & keeping.copied.keys():
            kept, self.tiers[name] = keeping.copied[name], Tier.DEVICE
            if kept.slot.source.stays_packed:
                self._packed.update(kept.tensors)
            else:
                kept.slot.place.module._parameters[kept.slot.place.name] = parameter(kept.tensors[name])
        keeping.chosen = set()
        self._order = [stop for stop in self._order if self._streamed(stop)]
        self._reopen()

    def _reopen(self) -> None:
        """The stream anew, from where the walk is, for what is streamed now."""
        if self._stream is not None:
            self._past = self.statistics()
            self._stream.close()
            self._stream = None  # before the next one's buffer is made
        if self._order:
            self._stream = self._open_stream()

    def _open_stream(self) -> WeightStream:
        names = self._order[self._position :] + self._order[: self._position]
        units = [StreamUnit(name, tuple(self._stream_tensors(name))) for name in names]
        largest = WeightStream.required_bytes(units, self._device)
        return WeightStream(
            units,
            reader=self._options.reader,
            budget_bytes=stream_bytes(largest, self._options.prefetch_bytes),
            device=self._device,
            on_event=self._options.on_event,
        )

    def _stream_tensors(self, stop: str) -> Iterator[StreamTensor]:
        seen = set()
        for slot in self._streamed(stop):
            for entry in slot.source.entries:
                if entry.name not in seen:
                    seen.add(entry.name)
                    target = slot.source.target_dtype(slot.place.dtype)
                    yield StreamTensor(entry.name, self._host.get(entry.name, entry), target)

    def _load_residents(self, sources: Mapping[str, ParameterSource]) -> None:
        for stop, slots in self._slots.items():
            for slot in slots:
                tier = Tier.DEVICE if stop is None else self.tiers[slot.source.name]
                if tier is Tier.DEVICE:
                    self._make_resident(slot)
                    continue
                slot.source.unbind(slot.place)
                if tier is Tier.HOST:
                    self._keep_on_host(slot.source)
        for name, buffer in self._stepped.model.named_buffers():
            if name in sources:
                buffer.copy_(self._read(sources[name].entries[0]).to(buffer.dtype))
        self._stepped.model._apply(_only_buffers(self._device))  # type: ignore[no-untyped-call]

    def _make_resident(self, slot: Slot) -> None:
        if slot.source.stays_packed:
            slot.source.unbind(slot.place)
            self._storage.budgets[Tier.DEVICE].reserve(slot.source.nbytes, "weights")
            self._packed.update({entry.name: self._read(entry).to(self._device) for entry in slot.source.entries})
            return
        twin = self._resident.get(slot.source.name)
        if twin is None:
            self._storage.budgets[Tier.DEVICE].reserve(slot.source.nbytes, "weights")
            tensors = {entry.name: self._read(entry) for entry in slot.source.entries}
            value = slot.source.assemble(tensors, self._stepped.model).to(self._device, slot.place.dtype)
            if self._uses[slot.source.name] == 1:
                value = laid_out_for(slot.place.module, slot.place.name, value)
            twin = self._resident.setdefault(slot.source.name, parameter(value))
        slot.place.module._parameters[slot.place.name] = twin

    def _keep_on_host(self, source: ParameterSource) -> None:
        for entry in source.entries:
            if entry.name not in self._host:
                kept = self._storage.zeros(Tier.HOST, tuple(entry.shape), TORCH_DTYPES[entry.dtype], "weights")
                self._host[entry.name] = kept.copy_(self._read(entry))

    def _read(self, entry: TensorEntry) -> torch.Tensor:
        """The stored tensor, in memory of its own."""
        buffer = AlignedBuffer(-(-entry.nbytes // PAGE) * PAGE + 2 * PAGE)
        start = self._options.reader.read(entry.file, entry.offset, entry.nbytes, buffer, 0)
        return buffer.view(start, TORCH_DTYPES[entry.dtype], entry.shape)


def _only_buffers(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """For `Module._apply`: moves buffers, leaves parameters (which are meta, or where they belong already)."""
    return lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.to(device)
