"""The kinds of model calls in a pass: the decode batch, prefixes, and micro-batches of joining or scored prompts.

Each builds the inputs of one ordinary `model(...)` call: left-padded tokens, the padding mask, the positions, a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from flexbatch.engine.attention import makes_keys_anew
from flexbatch.engine.cache_layers import (
    CopiedPrefixLayer,
    CopyingPrefillLayer,
    DecodeLayer,
    ExtendLayer,
    MergingDecodeLayer,
    MergingExtendLayer,
    MergingPrefillLayer,
    PrefillLayer,
    PrefixLayer,
    SideBySideLayer,
)
from flexbatch.engine.carried_keys import Stretch
from flexbatch.engine.causal_mask import visible
from flexbatch.engine.head import Asked, Read, Reader, SlicedHead
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.layer_store import LayerStore
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.prefix import Prefix
from flexbatch.engine.schedule import DecodePlaces, decode_places
from flexbatch.kernels.vectors import multiplies_tiles

# Matrix products are slower for odd numbers of rows (docs/benchmarks.md), and each number is compiled for anew; so many
# tokens are made a multiple of this. A processor with AMX multiplies sixteen rows in the time of eight.
EVEN_TOKENS = 16 if multiplies_tiles() else 8


@dataclass(frozen=True)
class DecodeRow:
    """A slot's newest token and what is guessed to follow it, how many tokens it has in the arena (0: an empty slot,
    whose logits mean nothing), how many columns before the arena's end the newest one goes, and the prefix that is kept
    apart from them."""

    tokens: tuple[int, ...] = (0,)
    length: int = 0
    lag: int = 0
    prefix: Prefix | None = None

    @property
    def before(self) -> int:
        """How many tokens come before the newest one."""
        return self.length + (len(self.prefix) if self.prefix else 0)


@dataclass(frozen=True)
class Piece(Generic[Read]):
    """One call of the model, not yet made: tokens and positions `[rows, tokens]`, the padding mask `[rows, columns]`
    (1: may be seen; side by side, bool `[rows, tokens, columns]` may say by which tokens), a cache layer for each
    decoder layer, and who reads the logits of the last `kept` positions (None: it is only for what it leaves in the
    cache)."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    is_padded: bool
    layers: Sequence[CacheLayerMixin]
    kept: int
    reader: Reader[Read] | None
    most_logits: int = 0
    """How many positions' logits are made at once side by side (0: as many as always)."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.ids.numel()

    @property
    def read(self) -> int:
        """The last so many positions of each row that somebody reads."""
        return self.kept if self.reader is not None else 0


@dataclass(frozen=True)
class Caller:
    """Makes the pieces of a pass, and calls the model with them: each `alone`, or several `together` in one call."""

    stepped: SteppedModel
    arena: KVArena
    device: torch.device
    host_attention: bool = False
    logits_of_guesses: int = 0

    @cached_property
    def head(self) -> SlicedHead:
        return SlicedHead(self.stepped.model)

    def alone(self, piece: Piece[Read]) -> list[Read]:
        """What the piece's reader makes of its logits."""
        inputs: dict[str, Any] = {
            "input_ids": piece.ids,
            "attention_mask": piece.mask,
            self.stepped.cache_argument: Cache(layers=list(piece.layers)),
            "use_cache": True,
        }
        if self.stepped.takes_position_ids:
            inputs["position_ids"] = piece.positions
        read = self.head.read(inputs, piece.kept, piece.reader)
        self._check_attended([piece])
        return read

    def together(self, pieces: Sequence[Piece[Any]]) -> list[list[Any]]:
        """The same for pieces whose tokens go through the model side by side, as one row: every matrix is read once for
        all of them, and only attention tells them apart. For models whose attention is ours."""
        dtype, count = self.stepped.model.dtype, sum(piece.tokens for piece in pieces)
        spare = torch.zeros(-count % EVEN_TOKENS, dtype=torch.long, device=self.device)
        starts = list(itertools.accumulate((piece.tokens for piece in pieces), initial=0))
        spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        masks = [visible(piece.mask, piece.ids.shape[1], dtype) if _is_masked(piece) else None for piece in pieces]
        # Masks of rows have their zeros at the left.
        seen_from = [(piece.mask == 0).sum(1) if piece.mask.ndim == 2 else None for piece in pieces]
        rows = [len(piece.ids) for piece in pieces]
        caches: list[CacheLayerMixin] = [
            SideBySideLayer(
                [Stretch(*each) for each in zip(spans, rows, layers, seen_from, masks, wanted, strict=True)]
            )
            for layers, wanted in _by_layer(pieces)
        ]
        inputs = {
            "input_ids": torch.cat([*(piece.ids.flatten() for piece in pieces), spare])[None],
            "position_ids": torch.cat([*(piece.positions.flatten() for piece in pieces), spare])[None],
            # A mask of four dimensions is taken as it is; attention has each piece's own.
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=self.device),
            self.stepped.cache_argument: Cache(layers=[*caches]),
            "use_cache": True,
        }
        read = self.head.read_pieces(
            inputs,
            [
                Asked(span, len(piece.ids), piece.kept, piece.reader, piece.most_logits)
                for span, piece in zip(spans, pieces, strict=True)
            ],
        )
        self._check_attended(pieces)
        return read

    def _check_attended(self, pieces: Sequence[Piece[Any]]) -> None:
        """EngineError where keys lost what belonged to them on their way to attention."""
        if any(isinstance(layer, MergingDecodeLayer) and layer.is_unread for piece in pieces for layer in piece.layers):
            raise makes_keys_anew(self.stepped.model)

    def decode(self, rows: Sequence[DecodeRow], reader: Reader[Read]) -> Piece[Read]:
        """The next tokens of the slots 0 to rows - 1: one of each row, and one for each of its guesses that is right.
        Where there are guesses or lags, all pieces must go side by side."""
        lengths, lags = [row.length for row in rows], [row.lag for row in rows]
        most = max(len(row.tokens) for row in rows)
        places = decode_places(self.arena.end, lengths, lags, most, self.arena.columns)
        width = places.width
        ids = torch.tensor([[*row.tokens, *row.tokens[-1:] * (width - len(row.tokens))] for row in rows])
        fed = [[row.before + min(place, len(row.tokens) - 1) for place in range(width)] for row in rows]
        columns = torch.arange(places.first, places.end + 1)
        newest = torch.tensor(places.newest)[:, None]
        seen = columns[None] >= newest - torch.tensor(lengths)[:, None]
        written = None
        if places.are_even:
            seen = seen.long()
        else:
            written = newest + torch.arange(width)
            seen = seen[:, None] & (columns <= written[..., None])
        shared = [(prefix, torch.tensor(members, device=self.device)) for prefix, members in _members(rows)]
        layers = [self._decode_layer(layer, len(rows), places, written, shared) for layer in self.arena.layers]
        ids, positions, mask = (each.to(self.device) for each in (ids, torch.tensor(fed), seen))
        return Piece(
            ids, positions, mask, True, layers, width, reader, most_logits=self.logits_of_guesses if width > 1 else 0
        )

    def _decode_layer(
        self,
        store: LayerStore,
        rows: int,
        places: DecodePlaces,
        written: torch.Tensor | None,
        shared: Sequence[tuple[Prefix, torch.Tensor]],
    ) -> DecodeLayer:
        if self.stepped.merges_prefixes:
            return MergingDecodeLayer(
                store, rows, places.first, places.end, written, shared, host_attention=self.host_attention
            )
        return DecodeLayer(store, rows, places.first, places.end, written)

    def compute(self, prefix: Prefix) -> Piece[None]:
        """The keys and values of a prefix."""
        ids = torch.tensor([prefix.tokens], device=self.device)
        positions = torch.arange(len(prefix), device=self.device)[None]
        kind = PrefixLayer if self.stepped.merges_prefixes else CopiedPrefixLayer
        layers = [kind(layer, prefix) for layer in self.arena.layers]
        return Piece(ids, positions, torch.ones_like(ids), False, layers, 1, None)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        logits_to_keep: int,
        reader: Reader[Read],
        width: int = 0,
    ) -> Piece[Read]:
        """Prompts, padded on the left to at least `width` tokens. Their keys and values go into `slots`, or nowhere if
        there are none."""
        ids, mask, is_padded = self._padded(prompts, width)
        end = self.arena.end
        lengths = list(map(len, prompts))
        layers = [PrefillLayer(layer, slots, end, lengths) for layer in self.arena.layers]
        return Piece(ids, _positions(mask), mask, is_padded, layers, logits_to_keep, reader)

    def prefill_after(
        self,
        prefix: Prefix,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        logits_to_keep: int,
        reader: Reader[Read],
    ) -> Piece[Read]:
        """As `prefill`, for the tokens that come after a shared prefix."""
        ids, mask, is_padded = self._padded(prompts, 0)
        positions, end, stores = _positions(mask) + len(prefix), self.arena.end, self.arena.layers
        layers: Sequence[CacheLayerMixin]
        own = list(map(len, prompts))
        if self.stepped.merges_prefixes:
            rows = torch.arange(len(prompts), device=self.device)
            layers = [MergingPrefillLayer(store, slots, end, own, prefix, rows) for store in stores]
        else:
            layers = [CopyingPrefillLayer(store, slots, end, prefix, own) for store in stores]
            columns = torch.arange(len(prefix) + ids.shape[1], device=self.device)
            mask = (columns[None] >= ids.shape[1] - torch.tensor(own, device=self.device)[:, None]).long()
        return Piece(ids, positions, mask, is_padded, layers, logits_to_keep, reader)

    def extend(
        self,
        tokens: Sequence[int],
        slot: int,
        before: int,
        end: int,
        logits_to_keep: int,
        reader: Reader[Read] | None,
    ) -> Piece[Read]:
        """`tokens` of a row after the `before` tokens that it has in the arena already, up to column `end`. The first
        part of a prompt has none before it."""
        ids = torch.tensor([list(tokens)], device=self.device)
        start = end + 1 - ids.shape[1]
        first = start - before
        is_merged = self.stepped.merges_prefixes and self.arena.is_compressed
        seen, kind = (ids.shape[1], MergingExtendLayer) if is_merged else (end + 1 - first, ExtendLayer)
        mask = torch.ones(1, seen, dtype=torch.long, device=self.device)
        positions = torch.arange(before, before + ids.shape[1], device=self.device)[None]
        layers = [kind(layer, slot, first, start) for layer in self.arena.layers]
        return Piece(ids, positions, mask, False, layers, logits_to_keep, reader)

    def _padded(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Tokens and mask, int64 `[rows, width]`, and whether any of it is padding."""
        width = max(width, *(len(prompt) for prompt in prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device), any(len(prompt) < width for prompt in prompts)


def _by_layer(pieces: Sequence[Piece[Any]]) -> Iterator[tuple[Sequence[CacheLayerMixin], Sequence[int | None]]]:
    """The pieces' cache layers, layer by layer, and what is asked of each: in the last layer what is read of it."""
    *others, last = zip(*(piece.layers for piece in pieces), strict=True)
    yield from ((layers, [None] * len(pieces)) for layers in others)
    yield last, [piece.read for piece in pieces]


def _is_masked(piece: Piece[Any]) -> bool:
    """Whether a query of it sees anything but all tokens of its row up to its own."""
    return piece.is_padded or piece.mask.shape[1] != piece.ids.shape[1]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _members(rows: Sequence[DecodeRow]) -> list[tuple[Prefix, list[int]]]:
    """The rows of each prefix that is kept apart."""
    members: dict[int, tuple[Prefix, list[int]]] = {}
    for index, row in enumerate(rows):
        if row.prefix is not None:
            members.setdefault(id(row.prefix), (row.prefix, []))[1].append(index)
    return list(members.values())
