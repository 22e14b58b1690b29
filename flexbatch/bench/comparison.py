"""What the runs of all engines come to: medians, ratios, shares of the roofline, as one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from flexbatch.bench.roofline import MachineLimits, arithmetic_seconds, job_seconds, work_of
from flexbatch.bench.trial import Outcome, Prompts

OWN = "flexbatch"


@dataclass(frozen=True)
class EngineRuns:
    """One engine's measured runs, one for each repeat, and the batch sizes that were tried before."""

    engine: str
    runs: tuple[Outcome, ...]
    tried: tuple[Outcome, ...] = ()

    @property
    def error(self) -> str:
        return next((run.error for run in self.runs if run.error), "")

    @property
    def rate(self) -> float:
        return median(run.rate for run in self.runs) if self.runs and not self.error else 0.0

    @property
    def peak(self) -> int:
        return max((run.peak or run.peak_resident for run in self.runs), default=0)


@dataclass(frozen=True)
class Shares:
    """What a run reaches: of its job's roofline and of the arithmetic alone by what was measured before and after it,
    and of the roofline by the fastest of all measurements."""

    roofline: float
    arithmetic: float
    fastest_roofline: float


@dataclass(frozen=True)
class Comparison:
    """Everything about one workload.

    `limits` are this comparison's own measurements: one before the first repeat, one after flexbatch's run in each. A
    machine that others share is not the same for half an hour: a run is held against what was measured on both sides.
    """

    prompts: Prompts
    new_tokens: int
    limits: tuple[MachineLimits, ...]
    engines: tuple[EngineRuns, ...]
    int8: bool = False

    def ratio(self, peer: EngineRuns) -> float | None:
        """How many times faster flexbatch is: the median over the repeats, each compared with its own neighbour."""
        own = next((engine for engine in self.engines if engine.engine == OWN), None)
        if own is None or own.error or peer.error or not own.runs or not peer.runs:
            return None
        return median(mine.rate / theirs.rate for mine, theirs in zip(own.runs, peer.runs, strict=False))

    def shares(self, repeat: int, run: Outcome) -> Shares:
        """Of the run of this repeat (from 0)."""
        least = [self._least_seconds(limits, run) for limits in self.limits]
        around = least[repeat : repeat + 2]
        return Shares(
            roofline=mean(job for job, _ in around) / run.seconds,
            arithmetic=mean(arithmetic for _, arithmetic in around) / run.seconds,
            fastest_roofline=min(job for job, _ in least) / run.seconds,
        )

    def median_shares(self, engine: EngineRuns) -> Shares:
        shares = [dataclasses.astuple(self.shares(repeat, run)) for repeat, run in enumerate(engine.runs)]
        return Shares(*(median(column) for column in zip(*shares, strict=True)))

    def _least_seconds(self, limits: MachineLimits, run: Outcome) -> tuple[float, float]:
        """The roofline of the run's job, and its arithmetic alone."""
        own = run.engine == OWN
        sharing = own and run.details.get("policy", {}).get("prefix_sharing", False)
        shared = self.prompts.shared_tokens if sharing else 0
        work = work_of(limits, self.prompts.lengths[: run.rows], self.new_tokens, shared)
        arithmetic = arithmetic_seconds(limits, work, min(run.batch, run.rows), int8=self.int8 and own)
        return job_seconds(limits, arithmetic, run.read_bytes), arithmetic

    def agreement(self) -> str:
        """Whether the engines that ran the same rows generated the same tokens, in words."""
        ran = [engine.runs[0] for engine in self.engines if engine.runs and not engine.error]
        whole = [run for run in ran if run.rows == len(self.prompts.token_ids)]
        if len(whole) < 2:
            return ""
        if len({run.digest for run in whole}) == 1:
            return f"{', '.join(run.engine for run in whole)} generated the same tokens"
        return "the engines' tokens are not all the same (other types, or sums in another order, decide near ties)"

    def record(self) -> list[dict[str, Any]]:
        """One entry for each engine, for the JSON line."""
        return [self._entry(engine) for engine in self.engines]

    def _entry(self, engine: EngineRuns) -> dict[str, Any]:
        if engine.error or not engine.runs:
            return {"engine": engine.engine, "error": engine.error or "not run", "tried": _tried(engine.tried)}
        shares = self.median_shares(engine)
        return {
            "engine": engine.engine,
            "batch": engine.runs[0].batch,
            "rows": engine.runs[0].rows,
            "tokens_per_second": engine.rate,
            "flexbatch_is_times_faster": None if engine.engine == OWN else self.ratio(engine),
            "share_of_roofline": shares.roofline,
            "share_of_fastest_roofline": shares.fastest_roofline,
            "share_of_arithmetic": shares.arithmetic,
            "peak_bytes": engine.peak,
            "peak_anonymous_bytes": max(run.peak_anonymous for run in engine.runs),
            "digest": engine.runs[0].digest,
            "runs": [dataclasses.asdict(run) for run in engine.runs],
            "tried": _tried(engine.tried),
        }


def _tried(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    return [
        {
            "batch": outcome.batch,
            "tokens_per_second": outcome.rate,
            "prefill_seconds": outcome.prefill_seconds,
            "seconds": outcome.seconds,
            "peak_bytes": outcome.peak,
            "error": outcome.error,
        }
        for outcome in outcomes
    ]
