"""What a run really took, added up pass by pass, to be set beside the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

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

    def measured(self) -> Measured:
        return Measured(
            self.seconds, self.passes, self.prefill_tokens, self.decode_tokens, dict(self.waits), dict(self.bytes_moved)
        )
