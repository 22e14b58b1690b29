"""The head of a causal LM on slices of its last hidden states, so that no call makes more logits than a slice has.

BLOOM's vocabulary has 250,880 words: the logits of 1,000 rows are a gigabyte in float32, and half of that again in 16
bits. Where a call would make more than a slice, its forward is left as soon as the decoder is through; then the model's
own forward is entered again for each slice, with the slice in place of what the decoder returns. So whatever the
model's authors do with logits (scales, soft caps) stays theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from flexbatch.plan.memory_need import logits_at_once

Read = TypeVar("Read")
Reader = Callable[[torch.Tensor, slice, slice], Read]
"""Makes of the logits, float32 `[rows, positions, vocabulary]`, what is wanted of them. It is told which rows and which
of the kept positions they are."""

_leaving: ContextVar[bool] = ContextVar("leaving", default=False)
_given: ContextVar[Any] = ContextVar("given", default=None)
# Each micro-batch runs in a greenlet of its own, and so in a context of its own.


class _Decoded(Exception):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True, slots=True)
class Asked:
    """What is read of one of several calls side by side: a `span` of the one row's tokens, really `rows` rows, of which
    the last `kept` positions are read by `reader` (None: by nobody), the logits of up to `most` positions at once (0:
    `logits_at_once`)."""

    span: slice
    rows: int
    kept: int
    reader: Reader[Any] | None
    most: int = 0


@dataclass(frozen=True, slots=True)
class _Block:
    """Some of what the `reader` of one of several pieces reads: `part` of its rows and kept positions, their ids
    `[rows, positions]` and hidden states `[rows, positions, size]`. Logits of `most` positions are made at once."""

    piece: int
    most: int
    part: tuple[slice, slice]
    ids: torch.Tensor
    hidden: torch.Tensor
    reader: Reader[Any]


class SlicedHead:
    """Calls the model and reads its logits, in slices where they are many."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._vocabulary = model.config.get_text_config().vocab_size
        base = model.base_model
        for body in (base, getattr(base, "decoder", None)):
            if isinstance(body, torch.nn.Module):
                body.forward = _replaceable(body.forward)

    def read(self, inputs: dict[str, Any], logits_to_keep: int, reader: Reader[Read] | None) -> list[Read]:
        """What `reader` makes of the logits of the last positions, slice after slice: first rows, then positions."""
        if reader is None:
            self._model(**inputs, logits_to_keep=1)
            return []
        rows = inputs["input_ids"].shape[0]
        most = logits_at_once(self._vocabulary)
        if rows * logits_to_keep <= most:
            logits = self._model(**inputs, logits_to_keep=logits_to_keep).logits
            return [reader(logits.float(), slice(0, rows), slice(0, logits_to_keep))]
        output = self._decoded(inputs)
        return self._read(inputs["input_ids"], output, output[0][:, -logits_to_keep:], reader)

    def read_pieces(self, inputs: dict[str, Any], pieces: Sequence[Asked]) -> list[list[Any]]:
        """The same for calls side by side. What fits into one slice goes through the head together, because the head's
        matrix is the largest of all."""
        output, made = self._decoded(inputs), [list[Any]() for _ in pieces]
        blocks = list(self._blocks(inputs["input_ids"][0], output[0][0], pieces))
        for run in _runs(blocks):
            ids, hidden = torch.cat([block.ids for block in run]), torch.cat([block.hidden for block in run])
            logits = self._logits(ids, output, hidden).float()
            for block, own in zip(run, torch.split(logits, [len(block.ids) for block in run]), strict=True):
                made[block.piece].append(block.reader(own, *block.part))
        if not blocks:
            last = pieces[-1].span.stop - 1
            here = slice(last, last + 1)
            # Every call comes by the head, where others wait for it.
            self._logits(inputs["input_ids"][:, here], output, output[0][:, here])
        return made

    def _blocks(self, ids: torch.Tensor, hidden: torch.Tensor, pieces: Sequence[Asked]) -> Iterator[_Block]:
        """What is read of pieces whose `ids` `[tokens]` and `hidden` states `[tokens, size]` lie side by side."""
        for index, piece in enumerate(pieces):
            if piece.reader is not None:
                rows, kept, most = piece.rows, piece.kept, piece.most or logits_at_once(self._vocabulary)
                own_ids = ids[piece.span].view(rows, -1)[:, -kept:]
                own_hidden = hidden[piece.span].view(rows, -1, hidden.shape[1])[:, -kept:]
                for part in slices(rows, kept, most):
                    yield _Block(index, most, part, own_ids[part], own_hidden[part], piece.reader)

    def _read(self, ids: torch.Tensor, output: Any, hidden: torch.Tensor, reader: Reader[Read]) -> list[Read]:
        return [
            reader(self._logits(ids[part[0]], output, hidden[part]).float(), *part)
            for part in slices(hidden.shape[0], hidden.shape[1], logits_at_once(self._vocabulary))
        ]

    def _decoded(self, inputs: dict[str, Any]) -> Any:
        leaving = _leaving.set(True)
        try:
            self._model(**inputs)
        except _Decoded as decoded:
            return decoded.output
        finally:
            _leaving.reset(leaving)
        raise AssertionError(f"{type(self._model).__name__} calls neither its base model nor that one's decoder")

    def _logits(self, ids: torch.Tensor, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        stands_in = type(output)(last_hidden_state=hidden) if isinstance(output, ModelOutput) else (hidden,)
        given = _given.set(stands_in)
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=hidden.shape[1]).logits
            return logits
        finally:
            _given.reset(given)


def _runs(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """Neighbours with as many positions in a row, together as long as each allows the logits of all."""
    run: list[_Block] = []
    for block in blocks:
        rows, positions = sum(len(each.ids) for each in run) + len(block.ids), block.ids.shape[1]
        most = min(each.most for each in [*run, block])
        if run and (run[0].ids.shape[1] != positions or rows * positions > most):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def slices(rows: int, positions: int, most: int) -> Iterator[tuple[slice, slice]]:
    """`rows` times `positions` cut into blocks of at most `most`: whole rows, or parts of one row."""
    if positions <= most:
        step = most // positions
        for first in range(0, rows, step):
            yield slice(first, min(rows, first + step)), slice(0, positions)
        return
    for row in range(rows):
        for first in range(0, positions, most):
            yield slice(row, row + 1), slice(first, min(positions, first + most))


def _replaceable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The outermost decoder that a call meets is left by its result, or replaced by what is given."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        given = _given.get()
        if given is not None:
            return given
        if not _leaving.get():
            return forward(*args, **kwargs)
        leaving = _leaving.set(False)
        try:
            raise _Decoded(forward(*args, **kwargs))
        finally:
            _leaving.reset(leaving)

    return replaced
