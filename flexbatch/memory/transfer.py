"""The weight stream: the tensors of one layer after the other, read ahead of use, pass after pass, in a fixed budget.

    stream = WeightStream(units, reader=reader, budget_bytes=512 << 20, device=torch.device("cpu"))
    for unit in endless(units):
        weights = stream.acquire(unit.name)
        ...
        stream.release(unit.name)
    stream.close()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flexbatch.memory.direct_io import Reader
from flexbatch.memory.safetensors_index import TensorEntry


@dataclass(frozen=True)
class StreamTensor:
    """One tensor of a unit: `source` is a place in a file (tier disk) or a tensor in main memory (tier host).

    It is delivered in `target_dtype` (None: as stored).
    """

    name: str
    source: TensorEntry | torch.Tensor
    target_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class StreamUnit:
    """What is needed at one moment: the streamed tensors of one decoder layer, of the embedding, of the head."""

    name: str
    tensors: tuple[StreamTensor, ...]


@dataclass(frozen=True)
class StreamStatistics:
    """Counters since the start. Seconds are sums over threads; links are `disk>device` and `host>device`."""

    bytes_moved: Mapping[str, int]
    busy_seconds: Mapping[str, float]
    wait_seconds: float
    units_delivered: int


OnEvent = Callable[[str, str, float, float, int], None]
"""Called with kind (`read`, `copy`, `wait`), name of the unit, start and end (`time.perf_counter` seconds), bytes."""


class WeightStream:
    """Delivers `units` in cyclic order, for ever. See the module's docstring."""

    def __init__(
        self,
        units: Sequence[StreamUnit],
        *,
        reader: Reader,
        budget_bytes: int,
        device: torch.device,
        threads: int = 4,
        chunk_bytes: int = 8 << 20,
        on_event: OnEvent | None = None,
    ) -> None:
        raise NotImplementedError

    @staticmethod
    def required_bytes(units: Sequence[StreamUnit], device: torch.device, *, threads: int = 4) -> int:
        """The smallest budget with which these units can be streamed: the largest unit and its staging, in bytes."""
        raise NotImplementedError

    def acquire(self, name: str) -> Mapping[str, torch.Tensor]:
        """The tensors of the next unit, which must be `name`, by `StreamTensor.name`; waits until they are there.

        They are views of the stream's buffer: valid until `release(name)`. Raises EngineError when a read failed (with
        file and offset), when `name` is not the next unit, or when the budget is held by units not yet released.
        """
        raise NotImplementedError

    def release(self, name: str) -> None:
        """Gives the unit's memory back to the stream. On CUDA, work queued so far on the current stream may still read it."""
        raise NotImplementedError

    def statistics(self) -> StreamStatistics:
        raise NotImplementedError

    def close(self) -> None:
        """Stops the workers and waits for them; a caller blocked in `acquire` gets an EngineError. Safe to repeat."""
        raise NotImplementedError
