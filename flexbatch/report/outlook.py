"""When a run will end, from what the plan expects of it and how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbatch.plan.cost_model import Prediction


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the plan expects of an attempt: `seconds` in all, `joining_seconds` of them in passes that take in
    `prompt_tokens`, the others in `still_passes` in which no prompt joins."""

    seconds: float = math.inf
    joining_seconds: float = 0.0
    prompt_tokens: float = 0.0
    still_passes: float = 0.0

    def part_done(self, prompt_tokens: float, still_passes: float) -> float:
        """The part of the whole time, from 0 to 1, that so much takes."""
        joined = self.joining_seconds * min(1.0, prompt_tokens / self.prompt_tokens) if self.prompt_tokens else 0.0
        still = self.seconds - self.joining_seconds
        stood = still * min(1.0, still_passes / self.still_passes) if self.still_passes else 0.0
        return (joined + stood) / self.seconds if math.isfinite(self.seconds) else 0.0

    def seconds_left(self, prompt_tokens: float, still_passes: float, elapsed: float) -> float:
        """After `elapsed` seconds in which so much was done: the rest, at the speed of what was done."""
        part = self.part_done(prompt_tokens, still_passes)
        return elapsed * (1.0 / part - 1.0) if part > 0.0 else self.seconds - elapsed


def outlook_of(prediction: Prediction, part: float) -> Outlook:
    """For an attempt at this part of the rows."""
    return Outlook(
        seconds=part * prediction.seconds,
        joining_seconds=part * prediction.joining_seconds,
        prompt_tokens=part * prediction.prompt_tokens,
        still_passes=part * (prediction.passes - prediction.joining_passes),
    )
