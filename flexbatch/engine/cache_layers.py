"""What a Transformers forward sees of the KV cache: one layer object for each kind of call, all views of the arena."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flexbatch.engine.carried_keys import OwnKeys, PackedKeys, SharedKeys, Stretch, carry, lay_side_by_side
from flexbatch.engine.layer_store import Attended, LayerStore
from flexbatch.kernels.prefill_attention import KeysAndValues

if TYPE_CHECKING:
    from flexbatch.engine.prefix import Prefix


class _View(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What all kinds share: there is nothing to initialise, and no window (masks see to windows)."""

    is_sliding = False

    def __init__(self, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._columns, self.is_initialized = columns, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:  # noqa: ARG002 - Transformers' signature
        self.is_initialized = True

    def get_max_length(self) -> int:
        return self._columns


class DecodeLayer(_View):  # type: ignore[no-untyped-call]
    """One token for every slot of the decode batch, written at column `end`, attending from column `first` on; or
    several for every slot, `written` into their columns of `[rows, tokens]`.

    All tiers' keys and values are brought together on the device, for any attention.
    """

    def __init__(self, store: LayerStore, rows: int, first: int, end: int, written: torch.Tensor | None = None) -> None:
        super().__init__(store.columns)
        self._store, self._rows, self._first, self._end, self._written = store, rows, first, end, written

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._written is None:
            self._store.write_column(self._end, keys, values)
        else:
            self._store.write_columns(self._written, keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        self._write(key_states, value_states)
        return self._store.gathered(self._rows, self._first, self._end, key_states.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._end - self._first + query_length, 0

    def get_seq_length(self) -> int:
        return self._end - self._first


class MergingDecodeLayer(DecodeLayer):  # type: ignore[no-untyped-call]
    """A decode batch under `attention.merging_attention`: tiers stay apart, and prefixes come before their rows.

    With `host_attention` the queries go to the keys on the host, otherwise those keys come to the device, some rows at
    a time. Packed ones are read as they are kept where attention can.
    """

    def __init__(
        self,
        store: LayerStore,
        rows: int,
        first: int,
        end: int,
        written: torch.Tensor | None,
        shared: Sequence[tuple[Prefix, torch.Tensor]],
        *,
        host_attention: bool,
    ) -> None:
        super().__init__(store, rows, first, end, written)
        self._shared, self._host_attention = shared, host_attention
        self.is_unread = False
        """Whether keys that were handed on part by part never came to attention."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        self._write(key_states, value_states)
        store, index = self._store, self._store.index
        shared = [SharedKeys(p.keys[index], p.values[index], rows) for p, rows in self._shared]
        if (whole := store.in_one_place(self._rows, self._first, self._end)) is not None:
            return carry(whole[0], shared), whole[1]
        self.is_unread = True
        return carry(key_states, shared, self._watched(self._parts(key_states.device))), value_states

    def _parts(self, device: torch.device) -> Iterator[OwnKeys] | Iterator[PackedKeys]:
        if self._store.attended is Attended.PACKED:
            return self._store.packed(self._rows, self._first, self._end)
        stays = self._host_attention
        return self._store.read(self._rows, self._first, self._end, device, host_attention=stays)

    def _watched(self, parts: Iterator[OwnKeys] | Iterator[PackedKeys]) -> Iterator[OwnKeys | PackedKeys]:
        """The parts; says when all were asked for."""
        yield from parts
        self.is_unread = False


class PrefillLayer(_View):  # type: ignore[no-untyped-call]
    """Joining prompts, of so many tokens behind padding: attention sees their own keys and values, which are also
    written into their slots (if any)."""

    def __init__(self, store: LayerStore, slots: Sequence[int], end: int, lengths: Sequence[int]) -> None:
        super().__init__(store.columns)
        self._store, self._slots, self._end, self._lengths = store, slots, end, lengths

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        return self._kept(key_states, value_states)

    def _kept(self, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """Writes them; what the cache has left of them is what attention sees, here as in every later pass."""
        parts = self._store.pack(keys, values)
        if self._slots:
            self._store.prepare(keys, values)
            self._store.write_prompts(self._slots, self._end, parts, self._lengths)
        return self._store.seen(parts, keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class MergingPrefillLayer(PrefillLayer):  # type: ignore[no-untyped-call]
    """Joining prompts after a shared prefix that attention merges with their own tokens; the slots get the own ones."""

    def __init__(
        self,
        store: LayerStore,
        slots: Sequence[int],
        end: int,
        lengths: Sequence[int],
        prefix: Prefix,
        rows: torch.Tensor,
    ) -> None:
        super().__init__(store, slots, end, lengths)
        self._prefix, self._rows = prefix, rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        keys, values = self._kept(key_states, value_states)
        index = self._store.index
        return carry(keys, [SharedKeys(self._prefix.keys[index], self._prefix.values[index], self._rows)]), values


class CopyingPrefillLayer(PrefillLayer):  # type: ignore[no-untyped-call]
    """Joining prompts after a shared prefix whose keys and values are copied before each row's own, without a gap.

    `own[row]` is how many of the row's tokens are its own; the others on its left are padding. A row of the result is
    padding, prefix, own tokens.
    """

    def __init__(self, store: LayerStore, slots: Sequence[int], end: int, prefix: Prefix, own: Sequence[int]) -> None:
        super().__init__(store, slots, end, [len(prefix) + each for each in own])
        self._prefix, self._own = prefix, own

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        index = self._store.index
        keys = self._joined(self._prefix.keys[index], key_states)
        values = self._joined(self._prefix.values[index], value_states)
        return self._kept(keys, values)

    def _joined(self, prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        width = states.shape[2]
        joined = states.new_zeros(states.shape[0], states.shape[1], len(self._prefix) + width, states.shape[3])
        for row, own in enumerate(self._own):
            joined[row, :, width - own : -own] = prefix[0]
            joined[row, :, -own:] = states[row, :, width - own :]
        return joined

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self._prefix) + query_length, 0

    def get_seq_length(self) -> int:
        return len(self._prefix)


class ExtendLayer(_View):  # type: ignore[no-untyped-call]
    """More tokens for a row that has some in the arena: written from column `start` on, and attending from `first`."""

    def __init__(self, store: LayerStore, slot: int, first: int, start: int) -> None:
        super().__init__(store.columns)
        self._store, self._slot, self._first, self._start = store, slot, first, start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        self._store.prepare(key_states, value_states)
        end = self._start + key_states.shape[2] - 1
        return self._store.extend(self._slot, self._first, end, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._start - self._first + query_length, 0

    def get_seq_length(self) -> int:
        return self._start - self._first


class MergingExtendLayer(ExtendLayer):  # type: ignore[no-untyped-call]
    """The same where attention merges what the row has already with the new tokens, as a prefix: those need not be made
    of what is kept of them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        self._store.prepare(key_states, value_states)
        end = self._start + key_states.shape[2] - 1
        before = self._store.extend_behind(self._slot, self._first, end, key_states, value_states)
        if before is None:
            return key_states, value_states
        return carry(key_states, [SharedKeys(*before, torch.zeros(1, dtype=torch.long))]), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class PrefixLayer(_View):  # type: ignore[no-untyped-call]
    """The forward that computes a prefix that attention merges: keeps each layer's keys and values as they are seen."""

    def __init__(self, store: LayerStore, prefix: Prefix) -> None:
        super().__init__(len(prefix))
        self._store, self._prefix = store, prefix

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        seen = self._seen(key_states, value_states)
        self._prefix.keep(*seen)
        return seen

    def _seen(self, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        return self._store.seen(self._store.pack(keys, values), keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class CopiedPrefixLayer(PrefixLayer):  # type: ignore[no-untyped-call]
    """The same for a prefix that is copied in front of rows: kept as it was made, because it is packed with them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        self._prefix.keep(key_states, value_states)
        return self._seen(key_states, value_states)


class SideBySideLayer(_View):  # type: ignore[no-untyped-call]
    """Several calls' tokens in one row: attention takes them apart, each stretch to its own cache layer."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        super().__init__(0)
        self._stretches = stretches

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        return lay_side_by_side(key_states, self._stretches), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0
