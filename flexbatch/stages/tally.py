"""What a run really took, added up pass by pass, to be set beside the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flexbatch.memory.main_memory import peak_resident_bytes
from flexbatch.records import PassResult
from flexbatch.report.plan_text import Measured


@dataclass
class Tally:
    seconds: float = 0.0
    passes: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    waits: dict[str, float] = field(default_factory=dict)
    bytes_moved: Counter[str] = field(default_factory=Counter)

    def add(self, result: PassResult) -> None:
        self.seconds += result.seconds
        self.passes += 1
        self.prefill_tokens += result.prefill_tokens
        self.decode_tokens += result.decode_tokens
        for cause, seconds in result.waits.items():
            self.waits[cause] = self.waits.get(cause, 0.0) + seconds
        self.bytes_moved.update(result.bytes_moved)

    def measured(self, peak_bytes: Mapping[str, int]) -> Measured:
        """The sums, with the peak of each tier whose peak is known."""
        return Measured(
            seconds=self.seconds,
            passes=self.passes,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            waits=dict(self.waits),
            bytes_moved=dict(self.bytes_moved),
            peak_bytes=peak_bytes,
        )


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process has held on the device: main memory where there is no accelerator."""
    if device.type == "cuda":
        return {"device": torch.cuda.max_memory_allocated(device)}
    return {"device": peak_resident_bytes()} if device.type == "cpu" else {}
