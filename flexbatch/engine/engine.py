"""Continuous batching over streamed weights: one pass over the layers is one step for every row in flight.

On each pass all live rows decode one token and new prompts are prefilled beside them; a row that is done frees its slot
for the next pass. Compute and weight traffic overlap evenly on every pass, so a job takes the larger of the two.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch

from flexbatch.engine.calls import Caller, DecodeRow, Piece
from flexbatch.engine.growing import ConstraintState, GrowingRow, Vocabulary, finish
from flexbatch.engine.guessing import NO_GUESSES, Guesses
from flexbatch.engine.head import Reader
from flexbatch.engine.joining import Entering, Joining, Part, alike, is_scored, keeps_growing
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.micro_batch import MicroBatch, walk
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.prefix import Prefix, PrefixStore
from flexbatch.engine.reading import Gain, grow, score_slice, scored
from flexbatch.engine.row_slots import RowSlots
from flexbatch.engine.schedule import in_turn, pack, pack_alike
from flexbatch.engine.storage import Storage
from flexbatch.engine.weights import Weights
from flexbatch.memory.heap import Heap
from flexbatch.memory.transfer import StreamStatistics
from flexbatch.plan.admission import Admission
from flexbatch.plan.policy import Tier
from flexbatch.plan.rows_in_flight import GuessRoom, hastened
from flexbatch.records import Completion, PassResult, Request


class Constraint(Protocol):
    """A compiled decoding constraint; one state per row."""

    def start(self) -> ConstraintState: ...


@dataclass
class _Pass:
    """What a pass gathers while it runs."""

    completions: list[Completion] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    decoded: list[Gain] = field(default_factory=list)
    """Those of `gains` whose rows were in slots before."""
    prefill_tokens: int = 0
    guessed_tokens: int = 0


class Engine:
    """Generates for a stream of requests. `run` yields after every pass; `close` gives all memory back."""

    def __init__(
        self,
        stepped: SteppedModel,
        weights: Weights,
        arena: KVArena,
        storage: Storage,
        vocabulary: Vocabulary,
        *,
        prefill_tokens: int,
        shortest_part: int = 0,
        whole_prompts: bool = False,
        padded_width: int = 0,
        share_prefixes: bool = True,
        host_attention: bool = False,
        constraints: Mapping[str, Constraint] | None = None,
        heap: Heap | None = None,
        prompts_bytes: int = 0,
        most_slots: int = 0,
        guesses: GuessRoom = NO_GUESSES,
    ) -> None:
        self._heap, self._prompts_bytes = heap or Heap(), prompts_bytes
        self._lent = self._spare = 0
        self._weights, self._arena, self._storage = weights, arena, storage
        self._caller = Caller(stepped, arena, storage.device, host_attention, guesses.logits)
        self._prefixes = PrefixStore(storage.budgets[Tier.DEVICE]) if share_prefixes else None
        self._vocabulary, self._constraints = vocabulary, constraints or {}
        self._admission, self._padded_width = Admission(prefill_tokens, shortest_part), padded_width
        self._whole_prompts = whole_prompts or bool(padded_width)
        self._side_by_side = stepped.lays_side_by_side and not padded_width
        self._entering: Entering | None = None
        self._slots = RowSlots(arena, most_slots)
        self._guesses = Guesses(guesses if self._side_by_side else NO_GUESSES, max(most_slots, arena.slots))
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[GrowingRow] = deque()
        self._all_came = False

    def run(self, requests: Iterator[Request]) -> Iterator[PassResult]:
        """Answers all requests. Each result tells what one pass brought; completions come in the order of finishing."""
        self._begin()
        while True:
            started, before = time.perf_counter(), self._statistics()
            this = _Pass()
            self._fetch(requests, this)
            if not (this.completions or self._waiting or self._slots.live or self._entering):
                return
            with torch.inference_mode():
                self._one_pass(this)
            after, seconds = self._statistics(), time.perf_counter() - started
            waits = {cause: each.wait_seconds - before[cause].wait_seconds for cause, each in after.items()}
            self._guesses.learn(this.decoded, seconds, waits["weights"], this.prefill_tokens + len(this.decoded))
            yield PassResult(
                completions=tuple(this.completions),
                new_tokens={gain.row.request.index: tuple(gain.row.tokens[-gain.tokens :]) for gain in this.gains},
                new_logprobs={
                    gain.row.request.index: tuple(gain.row.logprobs[-gain.tokens :])
                    for gain in this.gains
                    if gain.row.request.sampling.logprobs
                },
                seconds=seconds,
                rows_in_flight=len(self._slots.live) + (self._entering is not None),
                prefill_tokens=this.prefill_tokens,
                decode_tokens=sum(gain.tokens for gain in this.gains),
                guessed_tokens=this.guessed_tokens,
                right_tokens=sum(gain.tokens - 1 for gain in this.gains),
                waits=waits,
                bytes_moved=dict(_bytes_moved(after) - _bytes_moved(before)),
            )

    def logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What follows each token of these prompts, float32 `[rows, tokens of the longest, vocabulary]`, padded on the
        left; for measurements, between two runs."""
        kept = max(map(len, prompts))
        with torch.inference_mode():
            made: list[tuple[slice, slice, torch.Tensor]] = []
            piece = self._caller.prefill(prompts, [], kept, lambda logits, *where: made.append((*where, logits)))
            walk([MicroBatch(partial(self._caller.alone, piece))], self._weights.ready)
        whole = made[0][2].new_empty(len(prompts), kept, made[0][2].shape[-1])
        for rows, positions, logits in made:
            whole[rows, positions] = logits
        return whole

    def close(self) -> None:
        self._weights.close()
        self._arena.close()
        self._storage.close()

    def _statistics(self) -> dict[str, StreamStatistics]:
        """What was waited for, and what has moved on its behalf."""
        return {"weights": self._weights.statistics(), "kv": self._arena.statistics()}

    def _fetch(self, requests: Iterator[Request], this: _Pass) -> None:
        """Keeps as many requests waiting as could join; those whose journal already holds everything are done."""
        while len(self._waiting) < len(self._slots):
            request = next(requests, None)
            if request is None:
                self._all_came = True
                return
            row = self._started(request)
            done = finish(row, self._vocabulary) if row.tokens else None
            if done is None:
                self._waiting.append(row)
            else:
                this.completions.append(done)

    def _started(self, request: Request) -> GrowingRow:
        row = GrowingRow(request, list(request.resumed), list(request.resumed_logprobs))
        if request.constraint:
            row.constraint = self._constraints[request.constraint].start()
            for token in request.resumed:
                row.constraint.advance(token)
        return row

    def _one_pass(self, this: _Pass) -> None:
        self._slots.lay_out(self._entering, filter(keeps_growing, self._waiting), self._most_columns)
        self._arena.advance(1)
        if self._arena.takes_guesses:
            self._guesses.draw_up(self._slots.live)
        self._slots.reserve(0, self._entering)
        parts, joining, new_prefixes = self._join(this)
        self._slots.fill_holes({slot for batch in joining for slot in batch.slots} | {part.of.slot for part in parts})
        if self._all_came and not (self._waiting or parts or joining):
            self._use_free_slots()
        this.guessed_tokens = self._guesses.feed(self._slots.up_to_last)
        decoding = self._decoding()
        pieces: list[Piece[Any]] = [decoding] if decoding is not None else []
        pieces += [self._caller.compute(prefix) for prefix in new_prefixes]
        pieces += [self._part(part) for part in parts]
        pieces += [self._prefill(batch) for batch in joining]
        read = self._walk(pieces)
        if decoding is not None:
            self._settle_decoded(read.pop(0), this)
        del read[: len(new_prefixes)]
        for part in parts:
            self._settle_part(part, read.pop(0), this)
        for batch, answers in zip(joining, read, strict=True):
            self._settle(batch, answers, this)
        self._slots.settle({gain.row.request.index: gain.tokens for gain in this.decoded}, self._entering)
        if self._prefixes is not None:
            for prefix in new_prefixes:
                self._prefixes.admit(prefix)
            self._prefixes.keep_only(row.shared_tokens for row in (*self._slots.live, *self._waiting))

    def _walk(self, pieces: list[Piece[Any]]) -> list[list[Any]]:
        """All pieces through the model: in calls of several where they can be side by side, else each by itself. Gives
        what was read of each, the slices joined."""
        if self._side_by_side:
            groups = in_turn([piece.tokens for piece in pieces])
            calls = [MicroBatch(partial(self._caller.together, pieces[group])) for group in groups]
            read = [each for call in walk(calls, self._weights.ready) for each in call]
        else:
            calls = [MicroBatch(partial(self._caller.alone, piece)) for piece in pieces]
            read = walk(calls, self._weights.ready)
        return [[item for part in each for item in part] for each in read]

    def _join(self, this: _Pass) -> tuple[list[Part], list[Joining], list[Prefix]]:
        """Takes the prompts that are prefilled in this pass out of the waiting line: parts of long ones, micro-batches
        with slots, and the prefixes that must be computed before them."""
        self._admission.budget = hastened(self._prefill_tokens, self._guesses.pace)
        entering = self._entering
        free = [slot for slot in self._slots.free if not entering or slot != entering.slot]
        line = list(takewhile(self._finds_room, self._waiting))
        own = [len(row.fed_tokens) - len(self._shared(row)) for row in line]
        splittable = [self._may_be_split(row) for row in line]
        admitted = self._admission.admit(own, splittable, len(free), idle=not self._slots.live and entering is None)
        if admitted.sizes:
            self._slots.reserve(len(admitted.sizes) - 1, self._entering)
        joining, new_prefixes = self._batches([self._waiting.popleft() for _ in range(admitted.whole)], free)
        parts = [entering.next_part(self._arena.end - entering.row.lag)] if entering is not None else []
        if admitted.complete:
            self._entering = None
        if admitted.sizes:
            self._entering = Entering(self._waiting.popleft(), free.pop(0), list(admitted.sizes))
            parts.append(self._entering.next_part(self._arena.end))
        this.prefill_tokens += sum(len(part.tokens) for part in parts) + sum(own[: admitted.whole])
        this.prefill_tokens += sum(len(prefix) for prefix in new_prefixes)
        return parts, joining, new_prefixes

    def _finds_room(self, row: GrowingRow) -> bool:
        """Whether its slot is wide enough, if it needs one."""
        return not keeps_growing(row) or self._most_columns(row) <= self._arena.span

    def _most_columns(self, row: GrowingRow) -> int:
        """Of the arena, that a row in a slot may come to need."""
        request, is_apart = row.request, self._prefixes is not None and self._caller.stepped.merges_prefixes
        own = len(request.prompt_ids) - (request.shared_tokens if is_apart else 0)
        return max(own + request.sampling.max_new_tokens, self._padded_width)

    def _may_be_split(self, row: GrowingRow) -> bool:
        """Rows with a shared prefix are short without it, and those that need no slot have nowhere to keep a part."""
        return keeps_growing(row) and not self._shared(row) and not self._whole_prompts

    def _batches(self, rows: list[GrowingRow], free: list[int]) -> tuple[list[Joining], list[Prefix]]:
        """Whole prompts as micro-batches; those that go on growing take slots from `free`."""
        new_prefixes: list[Prefix] = []
        batches = []
        for (kind, shared), members in alike(rows, self._shared):
            prefix = self._prefix(shared, new_prefixes) if shared else None
            lengths = [max(len(row.fed_tokens) - len(shared), self._padded_width) for row in members]
            for group in pack_alike(lengths) if self._side_by_side else pack(lengths):
                chosen = [members[index] for index in group]
                slots = [free.pop(0) for _ in chosen] if kind is keeps_growing else []
                batches.append(Joining(chosen, slots, kind is is_scored, prefix))
        return batches, new_prefixes

    def _shared(self, row: GrowingRow) -> tuple[int, ...]:
        return row.shared_tokens if self._prefixes is not None else ()

    def _prefix(self, tokens: tuple[int, ...], new_prefixes: list[Prefix]) -> Prefix:
        assert self._prefixes is not None
        prefix, is_new = self._prefixes.get(tokens)
        if is_new:
            new_prefixes.append(prefix)
        return prefix

    def _use_free_slots(self) -> None:
        """No row comes any more: the memory of free slots, and what prompts needed, goes to weights."""
        if not (self._slots.live and self._weights.are_streamed and self._storage.gives_back):
            return
        more, self._lent = self._prompts_bytes - self._lent, self._prompts_bytes
        if more:
            self._heap.lend(self._lent)
        left = max(row.request.sampling.max_new_tokens - len(row.tokens) for row in self._slots.live)
        self._spare += self._slots.cut() + more
        given = min(self._spare, self._heap.room())  # the process may hold more than was planned
        self._spare -= given
        self._weights.keep(given, math.ceil(left / self._guesses.pace))

    def _begin(self) -> None:
        """What the end of the last run gave up is taken again."""
        self._all_came = False
        if self._slots.are_cut or self._lent:
            self._weights.forget()
            self._slots.take_again()
            self._lent = self._spare = 0
            self._heap.lend(0)

    def _decoding(self) -> Piece[list[Gain]] | None:
        """The decode batch over the slots up to the last live one; empty slots among them are rows of length 0."""
        slots = self._slots.up_to_last
        if not slots:
            return None
        rows = [
            DecodeRow((row.tokens[-1], *row.guesses), row.arena_length, row.lag, row.kept_apart)
            if row is not None
            else DecodeRow()
            for row in slots
        ]
        return self._caller.decode(rows, partial(grow, slots, self._vocabulary))

    def _prefill(self, batch: Joining) -> Piece[list[Any]]:
        keep = max(1, *(row.request.score_tokens for row in batch.rows))
        reader: Reader[list[Any]] = (
            partial(score_slice, [row.request for row in batch.rows], keep)
            if batch.scored
            else partial(grow, batch.rows, self._vocabulary)
        )
        if batch.prefix is None:
            prompts = [row.fed_tokens for row in batch.rows]
            return self._caller.prefill(prompts, batch.slots, keep, reader, self._padded_width)
        own = [row.fed_tokens[len(batch.prefix) :] for row in batch.rows]
        return self._caller.prefill_after(batch.prefix, own, batch.slots, keep, reader)

    def _part(self, part: Part) -> Piece[list[Gain]]:
        reader = partial(grow, [part.of.row], self._vocabulary) if part.completes else None
        return self._caller.extend(part.tokens, part.of.slot, part.before, part.last, 1, reader)

    def _settle_part(self, part: Part, gains: list[Gain], this: _Pass) -> None:
        """The last part of a prompt gives its row the first token."""
        if part.completes:
            self._settle(Joining([part.of.row], [part.of.slot], scored=False), gains, this)

    def _settle_decoded(self, gains: list[Gain], this: _Pass) -> None:
        """More tokens for every live row; those that are done leave their slots."""
        this.decoded += gains
        for slot, gain in zip(self._slots.occupied, gains, strict=True):
            if self._is_done(gain, this):
                self._slots.clear(slot)

    def _settle(self, batch: Joining, read: list[Any], this: _Pass) -> None:
        """What a prefill's logits gave: scores, or each row's first token."""
        if batch.scored:
            this.completions += [
                scored(row.request, [score for number, score in read if number == index])
                for index, row in enumerate(batch.rows)
            ]
            return
        for index, gain in enumerate(read):
            if not self._is_done(gain, this) and batch.slots:
                gain.row.kept_apart = batch.prefix if self._caller.stepped.merges_prefixes else None
                self._slots.put(batch.slots[index], gain.row)

    def _is_done(self, gain: Gain, this: _Pass) -> bool:
        """Takes note of what a row has gained in this pass, and says whether that is its end."""
        this.gains.append(gain)
        if gain.completion is None:
            return False
        this.completions.append(gain.completion)
        self._guesses.remember(gain.row)
        return True


def _bytes_moved(statistics: Mapping[str, StreamStatistics]) -> Counter[str]:
    """Bytes by link, whatever for."""
    return sum((Counter(each.bytes_moved) for each in statistics.values()), Counter[str]())
