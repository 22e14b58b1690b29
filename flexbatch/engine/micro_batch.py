"""Micro-batches are coroutines: each one's ordinary `model(...)` call runs in its own greenlet.

Every stop of the model hands control back on entry, so the walk below can make one stop's weights ready once, take all
micro-batches through it, and go on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from flexbatch.engine.model import SteppedModel, Stop
from flexbatch.errors import EngineError

Ready = Callable[[Stop], AbstractContextManager[None]]
Parked = Callable[[torch.Tensor], Callable[[], None]]
"""Takes away the memory of a waiting tensor; what it returns brings it back."""


_last: ContextVar[Stop | None] = ContextVar("last", default=None)
"""The stop that a micro-batch was at last (each greenlet has a context of its own)."""


class MicroBatch:
    """One call of the model under way. `result` is what the call returned, once `resume` has returned None."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._greenlet = greenlet(call)
        self.result: Any = None

    def resume(self) -> Stop | None:
        """Runs to the next stop and returns it, or to the end and returns None. Errors of the model come out here."""
        value = self._greenlet.switch()
        if self._greenlet.dead:
            self.result = value
            return None
        stop: Stop = value
        return stop

    def give_up(self) -> None:
        """Ends a call that is under way; what it had parked comes back."""
        if self._greenlet:
            self._greenlet.throw()


def walk(micro_batches: Sequence[MicroBatch], ready: Ready) -> list[Any]:
    """One pass: all micro-batches through the model together, stop by stop. Returns what each call returned."""
    try:
        waiting = [micro_batch.resume() for micro_batch in micro_batches]
        while waiting and (stop := waiting[0]) is not None:
            if any(other is not stop for other in waiting):
                raise EngineError("The model's layers are met in different orders by different micro-batches.")
            with ready(stop):
                waiting = [micro_batch.resume() for micro_batch in micro_batches]
    except BaseException:
        for micro_batch in micro_batches:
            micro_batch.give_up()
        raise
    return [micro_batch.result for micro_batch in micro_batches]


def install_stops(stepped: SteppedModel, parked: Parked | None, settle: Callable[[], None]) -> None:
    """Wraps every stop's forward so that it first hands control to the walk; with `parked`, hidden states make room.
    `settle` is called whenever a call arrives at a stop, when what the stop before needed is free again."""
    for stop in stepped.stops:
        parked_here = parked if stop.layer is not None else None
        stop.module.forward = _stopping(stop, stop.module.forward, parked_here, settle)


def _stopping(
    stop: Stop, forward: Callable[..., Any], parked: Parked | None, settle: Callable[[], None]
) -> Callable[..., Any]:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        if stop.layer is None and _last.get() is stop:
            return forward(*_canonical(args), **kwargs)  # met again at once: its weights are still there
        restore = parked(args[0] if args else kwargs["hidden_states"]) if parked is not None else None
        walker = getcurrent().parent
        assert walker is not None, "a stop was met outside a walk"
        settle()
        try:
            walker.switch(stop)
            _last.set(stop)
        finally:
            if restore is not None:
                restore()
        return forward(*_canonical(args), **kwargs)

    return stopped


def _canonical(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers with the strides of new tensors.

    The head gets the last positions of a prefill as a slice. Where its strides are not those of a new tensor, though
    it may pass as contiguous (one row, one position), torch's linear without a bias copies the whole vocabulary matrix
    for each row: a fifth of a small model's prefill.
    """
    return tuple(each.reshape(-1).view(each.shape) if isinstance(each, torch.Tensor) else each for each in arguments)
