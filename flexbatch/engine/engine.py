"""Continuous batching over streamed weights: one pass over the layers is one step for every row in flight.

On each pass all live rows decode one token and new prompts are prefilled beside them; a row that is done frees its slot
for the next pass. Compute and weight traffic overlap evenly on every pass, so a job takes the larger of the two.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from flexbatch.engine.calls import Caller, DecodeRow
from flexbatch.engine.growing import ConstraintState, Decoder, GrowingRow, finish
from flexbatch.engine.joining import Entering, Joining, Part, alike, is_scored, keeps_growing
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.micro_batch import MicroBatch, walk
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.prefix import Prefix, PrefixStore
from flexbatch.engine.sampling import choose, log_probabilities
from flexbatch.engine.schedule import pack
from flexbatch.engine.storage import Storage
from flexbatch.engine.weights import Weights
from flexbatch.plan.admission import Admission
from flexbatch.plan.policy import Tier
from flexbatch.records import Completion, PassResult, Request


class Constraint(Protocol):
    """A compiled decoding constraint; one state per row."""

    def start(self) -> ConstraintState: ...


@dataclass(frozen=True)
class Vocabulary:
    """What the engine must know of the tokenizer: how to decode, and which tokens end a sequence."""

    decoder: Decoder
    end_tokens: frozenset[int]


@dataclass
class _Pass:
    """What a pass gathers while it runs."""

    completions: list[Completion] = field(default_factory=list)
    grown: list[GrowingRow] = field(default_factory=list)
    prefill_tokens: int = 0
    decode_tokens: int = 0


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
        padded_width: int = 0,
        share_prefixes: bool = True,
        host_attention: bool = False,
        constraints: Mapping[str, Constraint] | None = None,
    ) -> None:
        self._weights, self._arena, self._storage = weights, arena, storage
        self._caller = Caller(stepped, arena, storage.device, host_attention)
        self._prefixes = PrefixStore(storage.budgets[Tier.DEVICE]) if share_prefixes else None
        self._vocabulary, self._constraints = vocabulary, constraints or {}
        self._admission, self._padded_width = Admission(prefill_tokens, shortest_part), padded_width
        self._entering: Entering | None = None
        self._slots: list[GrowingRow | None] = [None] * arena.slots
        self._waiting: deque[GrowingRow] = deque()

    def run(self, requests: Iterator[Request]) -> Iterator[PassResult]:
        """Answers all requests. Each result tells what one pass brought; completions come in the order of finishing."""
        while True:
            started, before = time.perf_counter(), self._weights.statistics()
            this = _Pass()
            self._fetch(requests, this)
            if not (this.completions or self._waiting or self._live or self._entering):
                return
            with torch.inference_mode():
                self._one_pass(this)
            after = self._weights.statistics()
            yield PassResult(
                completions=tuple(this.completions),
                new_tokens={row.request.index: (row.tokens[-1],) for row in this.grown},
                new_logprobs={
                    row.request.index: (row.logprobs[-1],) for row in this.grown if row.request.sampling.logprobs
                },
                seconds=time.perf_counter() - started,
                rows_in_flight=len(self._live) + (self._entering is not None),
                prefill_tokens=this.prefill_tokens,
                decode_tokens=this.decode_tokens,
                waits={"weights": after.wait_seconds - before.wait_seconds},
                bytes_moved={
                    link: count - before.bytes_moved.get(link, 0) for link, count in after.bytes_moved.items()
                },
            )

    def logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What follows each token of these prompts, float32 `[rows, tokens of the longest, vocabulary]`, padded on the
        left; for measurements, between two runs."""
        kept = max(map(len, prompts))
        with torch.inference_mode():
            made: torch.Tensor = walk(
                [MicroBatch(partial(self._caller.prefill, prompts, [], kept))], self._weights.ready
            )[0]
        return made

    def close(self) -> None:
        self._weights.close()
        self._storage.close()

    @property
    def _live(self) -> list[GrowingRow]:
        return [row for row in self._slots if row is not None]

    def _fetch(self, requests: Iterator[Request], this: _Pass) -> None:
        """Keeps as many requests waiting as could join; those whose journal already holds everything are done."""
        while len(self._waiting) < len(self._slots):
            request = next(requests, None)
            if request is None:
                return
            row = self._started(request)
            done = finish(row, self._vocabulary.end_tokens, self._vocabulary.decoder) if row.tokens else None
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
        self._arena.advance()
        parts, joining, new_prefixes = self._join(this)
        self._fill_holes(parts, joining)
        decoding = self._decoding()
        batches = [MicroBatch(decoding)] if decoding is not None else []
        batches += [MicroBatch(partial(self._caller.compute, prefix)) for prefix in new_prefixes]
        batches += [MicroBatch(partial(self._extend, part)) for part in parts]
        batches += [MicroBatch(partial(self._prefill, batch)) for batch in joining]
        results = walk(batches, self._weights.ready)
        if decoding is not None:
            self._settle_decoded(results.pop(0), this)
        del results[: len(new_prefixes)]
        for part in parts:
            self._settle_part(part, results.pop(0), this)
        for batch, logits in zip(joining, results, strict=True):
            self._settle(batch, logits, this)
        if self._prefixes is not None:
            for prefix in new_prefixes:
                self._prefixes.admit(prefix)
            self._prefixes.keep_only(row.shared_tokens for row in (*self._live, *self._waiting))

    def _join(self, this: _Pass) -> tuple[list[Part], list[Joining], list[Prefix]]:
        """Takes the prompts that are prefilled in this pass out of the waiting line: parts of long ones, micro-batches
        with slots, and the prefixes that must be computed before them."""
        entering = self._entering
        free = [slot for slot, row in enumerate(self._slots) if row is None and (not entering or slot != entering.slot)]
        own = [len(row.fed_tokens) - len(self._shared(row)) for row in self._waiting]
        splittable = [self._may_be_split(row) for row in self._waiting]
        admitted = self._admission.admit(own, splittable, len(free), idle=not self._live and entering is None)
        if admitted.sizes:
            self._arena.reserve(len(admitted.sizes) - 1)
        joining, new_prefixes = self._batches([self._waiting.popleft() for _ in range(admitted.whole)], free)
        parts = [entering.next_part(self._arena.end)] if entering is not None else []
        if admitted.complete:
            self._entering = None
        if admitted.sizes:
            self._entering = Entering(self._waiting.popleft(), free.pop(0), list(admitted.sizes))
            parts.append(self._entering.next_part(self._arena.end))
        this.prefill_tokens += sum(len(part.tokens) for part in parts) + sum(own[: admitted.whole])
        this.prefill_tokens += sum(len(prefix) for prefix in new_prefixes)
        return parts, joining, new_prefixes

    def _may_be_split(self, row: GrowingRow) -> bool:
        """Rows with a shared prefix are short without it, and those that need no slot have nowhere to keep a part."""
        return keeps_growing(row) and not self._shared(row) and not self._padded_width

    def _batches(self, rows: list[GrowingRow], free: list[int]) -> tuple[list[Joining], list[Prefix]]:
        """Whole prompts as micro-batches; those that go on growing take slots from `free`."""
        new_prefixes: list[Prefix] = []
        batches = []
        for (kind, shared), members in alike(rows, self._shared):
            prefix = self._prefix(shared, new_prefixes) if shared else None
            lengths = [max(len(row.fed_tokens) - len(shared), self._padded_width) for row in members]
            for group in pack(lengths):
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

    def _fill_holes(self, parts: list[Part], joining: list[Joining]) -> None:
        """Moves rows from the end into empty slots before them that nobody joins, so that the decode batch is dense."""
        taken = {slot for batch in joining for slot in batch.slots}
        taken |= {part.of.slot for part in parts}
        occupied = [slot for slot, row in enumerate(self._slots) if row is not None]
        holes = [slot for slot, row in enumerate(self._slots) if row is None and slot not in taken]
        for hole, last in zip(holes, reversed(occupied), strict=False):
            if hole > last:
                break
            self._arena.move(last, hole)
            self._slots[hole], self._slots[last] = self._slots[last], None

    def _decoding(self) -> partial[torch.Tensor] | None:
        """The decode call over the slots up to the last live one; empty slots among them are rows of length 0."""
        if not self._live:
            return None
        last = max(slot for slot, row in enumerate(self._slots) if row is not None)
        rows = [
            DecodeRow(row.tokens[-1], row.arena_length, row.kept_apart) if row is not None else DecodeRow()
            for row in self._slots[: last + 1]
        ]
        return partial(self._caller.decode, rows)

    def _prefill(self, batch: Joining) -> torch.Tensor:
        keep = max(1, *(row.request.score_tokens for row in batch.rows))
        if batch.prefix is None:
            prompts = [row.fed_tokens for row in batch.rows]
            return self._caller.prefill(prompts, batch.slots, keep, self._padded_width)
        own = [row.fed_tokens[len(batch.prefix) :] for row in batch.rows]
        return self._caller.prefill_after(batch.prefix, own, batch.slots, keep)

    def _extend(self, part: Part) -> torch.Tensor:
        return self._caller.extend([part.tokens], [part.of.slot], [part.before], part.last, 1)

    def _settle_part(self, part: Part, logits: torch.Tensor, this: _Pass) -> None:
        """The last part of a prompt gives its row the first token."""
        if part.completes:
            self._settle(Joining([part.of.row], [part.of.slot], scored=False), logits, this)

    def _settle_decoded(self, logits: torch.Tensor, this: _Pass) -> None:
        """One more token for every live row; those that are done leave their slots."""
        slots = [slot for slot, row in enumerate(self._slots) if row is not None]
        rows = self._live
        this.decode_tokens += len(rows)
        self._grow(rows, logits[slots], this)
        for slot, row in zip(slots, rows, strict=True):
            if self._is_done(row, this):
                self._slots[slot] = None

    def _settle(self, batch: Joining, logits: torch.Tensor, this: _Pass) -> None:
        """What a prefill's logits mean: scores, or each row's first token."""
        if batch.scored:
            this.completions += [_score(row.request, logits[index]) for index, row in enumerate(batch.rows)]
            return
        this.decode_tokens += len(batch.rows)
        self._grow(batch.rows, logits[:, -1], this)
        for index, row in enumerate(batch.rows):
            if not self._is_done(row, this) and batch.slots:
                row.kept_apart = batch.prefix if self._caller.stepped.merges_prefixes else None
                self._slots[batch.slots[index]] = row

    def _grow(self, rows: list[GrowingRow], logits: torch.Tensor, this: _Pass) -> None:
        """One more token for each row from its logits, float32 `[rows, vocabulary]`."""
        samplings = [row.request.sampling for row in rows]
        steps = [len(row.tokens) for row in rows]
        allowed = logits
        for index, row in enumerate(rows):
            mask = self._forbidden(row, logits.shape[-1])
            if mask is not None:
                allowed = logits.clone() if allowed is logits else allowed
                allowed[index].masked_fill_(mask.to(logits.device), -torch.inf)
        tokens = choose(allowed, samplings, steps)
        wanted = any(sampling.logprobs for sampling in samplings)
        logprobs = log_probabilities(logits, tokens).tolist() if wanted else []
        for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.add(token, logprobs[index] if row.request.sampling.logprobs else None)
        this.grown += rows

    def _forbidden(self, row: GrowingRow, vocabulary_size: int) -> torch.Tensor | None:
        """bool `[vocabulary]`, true for tokens that may not come next (minimum length, constraint), or None."""
        forbidden = None
        if row.constraint is not None:
            forbidden = ~row.constraint.allowed()
            forbidden = torch.nn.functional.pad(
                forbidden[:vocabulary_size], (0, max(0, vocabulary_size - len(forbidden))), value=True
            )
        if len(row.tokens) < row.request.sampling.min_new_tokens and self._vocabulary.end_tokens:
            forbidden = torch.zeros(vocabulary_size, dtype=torch.bool) if forbidden is None else forbidden.clone()
            forbidden[[token for token in self._vocabulary.end_tokens if token < vocabulary_size]] = True
        return forbidden

    def _is_done(self, row: GrowingRow, this: _Pass) -> bool:
        done = finish(row, self._vocabulary.end_tokens, self._vocabulary.decoder)
        if done is None:
            return False
        this.completions.append(done)
        return True


def _score(request: Request, logits: torch.Tensor) -> Completion:
    """The last `score_tokens` prompt tokens, scored. `logits` float32 `[kept, vocabulary]`."""
    count = request.score_tokens
    targets = torch.tensor(request.prompt_ids[-count:], device=logits.device)
    before = logits[-count:]
    greedy = bool((before.argmax(-1) == targets).all())
    logprobs = tuple(log_probabilities(before, targets).tolist())
    return Completion(request.index, request.prompt_ids[-count:], "", "stop", logprobs, greedy)
