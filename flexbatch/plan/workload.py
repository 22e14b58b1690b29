"""What a job asks for: how many rows, how long, how much of it shared, and what that means for each pass."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flexbatch.errors import ConfigError
from flexbatch.plan.admission import Admission
from flexbatch.plan.kv_rooms import TAIL_COLUMNS, block_columns


@dataclass(frozen=True, slots=True)
class Workload:
    """A job's rows. `prompt_lengths` and `new_lengths` (tokens) are samples that stand for all rows: one in
    `every` rows, in the job's order.

    `longest_prompt` and `longest_new` bound every row (the KV cache is laid out for them). Where prompts share a
    prefix, `shared_tokens` of each prompt are its group's, on the average, and `rows_per_group` rows share one;
    `longest_own` bounds what is left of a prompt (0: the longest prompt without so many).
    """

    rows: int
    prompt_lengths: tuple[int, ...]
    new_lengths: tuple[int, ...]
    longest_prompt: int
    longest_new: int
    shared_tokens: float = 0.0
    rows_per_group: float = 1.0
    longest_own: int = 0
    every: int = 1

    @staticmethod
    def uniform(rows: int, prompt: int = 512, new: int = 32, **more: Any) -> Workload:
        """Every row alike."""
        return Workload(rows, (prompt,), (new,), prompt, new, **more)

    @staticmethod
    def from_samples(
        rows: int, prompt_lengths: Sequence[int], longest_new: int, *, new_lengths: Sequence[int] = (), **more: Any
    ) -> Workload:
        """From prompt lengths of some rows; without `new_lengths` every row generates `longest_new` tokens."""
        if rows < 1 or not prompt_lengths:
            raise ConfigError("the dataset has no rows to plan for.", remedy="Check dataset.path and dataset.limit.")
        lengths = tuple(max(1, length) for length in prompt_lengths)
        return Workload(rows, lengths, tuple(new_lengths) or (longest_new,), max(lengths), longest_new, **more)

    @property
    def prompt_tokens(self) -> float:
        return sum(self.prompt_lengths) / len(self.prompt_lengths)

    @property
    def own_tokens(self) -> float:
        """Prompt tokens of a row that are not its group's."""
        return max(1.0, self.prompt_tokens - self.shared_tokens)

    @property
    def own_squares(self) -> float:
        """Mean of own tokens squared: what prefill attention grows with."""
        own = [max(1.0, length - self.shared_tokens) for length in self.prompt_lengths]
        return sum(length * length for length in own) / len(own)

    @property
    def new_tokens(self) -> float:
        return sum(self.new_lengths) / len(self.new_lengths)

    @property
    def generated_tokens(self) -> float:
        return self.rows * self.new_tokens

    def groups_at_once(self, slots: int) -> int:
        """The most groups that have rows in flight, the next one's among them; where the samples are all rows, no more
        than there are."""
        groups = math.ceil(slots / self.rows_per_group) + 1
        are_known = len(self.prompt_lengths) >= self.rows
        return min(groups, math.ceil(self.rows / self.rows_per_group)) if are_known else groups

    def as_run(self, prefix_sharing: bool) -> Workload:
        """As it is where prefixes are shared, else without what prompts have in common."""
        return self if prefix_sharing else replace(self, shared_tokens=0.0, rows_per_group=1.0, longest_own=0)

    @property
    def longest_kept(self) -> int:
        """Prompt tokens that a row may have in its slot."""
        return self.longest_own or max(1, self.longest_prompt - math.floor(self.shared_tokens))


@dataclass(frozen=True, slots=True)
class PassLoad:
    """What one pass does: `joining` prompts prefilled, `decoding` rows gain a token, `groups` prefixes computed. In the
    `last` ones no row comes any more: what prompts needed, and `idle` slots, is memory that holds weights."""

    joining: float
    decoding: float
    groups: float = 0.0
    idle: int = 0
    last: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often each kind of pass occurs in a job, and in the first passes until the slots are full (the ramp)."""

    loads: Mapping[PassLoad, float]
    ramp: Mapping[PassLoad, float]

    @property
    def passes(self) -> float:
        return sum(self.loads.values())


def schedule(workload: Workload, slots: int, prefill_tokens: float, shortest_part: int) -> Schedule:
    """The passes of a job. A long job is simulated at two lengths and continued as the straight line between them;
    what it does when no row comes any more does not grow.

    With a `shortest_part` prompts enter in parts where they do not fit a pass's tokens; 0: whole.
    """
    slots = min(slots, workload.rows)
    short, long = 4 * slots, 6 * slots
    if workload.rows <= long:
        loads, ramp = _Simulation(workload, slots, prefill_tokens, shortest_part).run(workload.rows)
        return Schedule(loads, ramp)
    (first, ramp), (second, _) = (
        _Simulation(workload, slots, prefill_tokens, shortest_part).run(rows) for rows in (short, long)
    )
    times = (workload.rows - long) / (long - short)
    more = {load: times * (second.get(load, 0) - first.get(load, 0)) for load in {**first, **second} if not load.last}
    loads = {load: count for load in {**second, **more} if (count := second.get(load, 0) + more.get(load, 0.0)) > 0}
    return Schedule(loads, ramp)


class _Simulation:
    """The engine's admission, pass by pass, with prompts of mean length."""

    def __init__(self, workload: Workload, slots: int, prefill_tokens: float, shortest_part: int) -> None:
        self._workload, self._slots = workload, slots
        self._admission = Admission(prefill_tokens, shortest_part)
        # Rows with a shared prefix enter whole: their own parts are short.
        self._splittable = not workload.shared_tokens
        self._taken = self._live = 0
        # leaving[k] rows free their slots k passes from now.
        self._leaving: deque[int] = deque([0] * (max(workload.new_lengths) + 1))

    def run(self, rows: int) -> tuple[dict[PassLoad, float], dict[PassLoad, float]]:
        """How often each load occurs, and how often until the slots are full."""
        waiting, filling, shared, idle, last = rows, True, self._workload.shared_tokens, 0, False
        loads: Counter[PassLoad] = Counter()
        ramp: Counter[PassLoad] = Counter()
        while waiting or self._live or self._admission.is_entering:
            self._live -= self._leaving.popleft()
            self._leaving.append(0)
            live = self._live
            joining, started = self._join(waiting)
            waiting -= started
            if joining or live:
                load = PassLoad(joining, live, joining / self._workload.rows_per_group if shared else 0.0, idle, last)
                loads[load] += 1
                if filling:
                    ramp[load] += 1
            if not (waiting or joining):
                idle, last = self._slots - live, True
            filling = filling and self._live + self._admission.is_entering < self._slots and waiting > 0
        return dict(loads), dict(ramp)

    def _join(self, waiting: int) -> tuple[float, int]:
        """Prompts that are prefilled in this pass (parts of one count as such), and those that left the line."""
        length, admission = self._workload.own_tokens, self._admission
        free = self._slots - self._live - admission.is_entering
        line = min(waiting, int((admission.budget + admission.saved) / length) + 2)
        entered = admission.admit(
            [length] * line, [self._splittable] * line, free, not self._live and not admission.is_entering
        )
        for _ in range(entered.whole + entered.complete):
            self._begin()
        tokens = entered.part + entered.whole * length + (entered.sizes[0] if entered.sizes else 0)
        return tokens / length, entered.whole + bool(entered.sizes)

    def _begin(self) -> None:
        """A row has its first token; it takes its generated length from the sample in turn."""
        lengths = self._workload.new_lengths
        new = lengths[self._taken % len(lengths)]
        self._taken += 1
        if new > 1:
            self._leaving[new - 1] += 1
            self._live += 1


def span(workload: Workload) -> int:
    """The longest that a row's own part can get: prompt without the shared prefix, and completion."""
    return workload.longest_kept + workload.longest_new


def stored_columns(workload: Workload) -> float:
    """Columns with which a slot on disk is read, on the average: those of rows that are half done, where they are
    written anew on the way."""
    grown = max(0.0, workload.new_tokens - TAIL_COLUMNS) / 2.0
    return _mean_block_columns(workload.prompt_lengths, workload.shared_tokens, grown, span(workload))


@lru_cache(maxsize=64)
def _mean_block_columns(lengths: tuple[int, ...], shared: float, grown: float, most: int) -> float:
    return sum(block_columns(math.ceil(max(1.0, length - shared) + grown), most) for length in lengths) / len(lengths)


def columns(workload: Workload) -> int:
    """Columns of the KV arena: the longest row, and room between two shifts."""
    return span(workload) + column_slack(span(workload))


def column_slack(longest: int) -> int:
    """Columns between two shifts of the arena: few, because every slot has them, and many enough that the shift's copy
    costs little beside the passes between. With s columns a pass streams weights for s of them and copies a part 1/s
    of the arena, so the root of a row's length is near the best, whatever the machine; 16 at the least."""
    return max(16, math.isqrt(longest))
