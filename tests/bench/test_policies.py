"""The automatic policy beside hand-made ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from flexbatch.bench.engines import hand_made, streaming
from flexbatch.bench.policies import measure_policies, spread
from flexbatch.bench.trial import Outcome, Prompts, Trial
from flexbatch.errors import EngineError
from tests.bench.support import tiny_trial

PROMPTS = Prompts(tuple(tuple(range(5 + row, 29 + row)) for row in range(12)))


def test_every_listed_policy_runs_and_gives_the_tokens_of_the_automatic_one(tmp_path: Path) -> None:
    trial = tiny_trial(tmp_path, "flexbatch", PROMPTS)
    listed = hand_made.run(trial).details["policies"]
    assert len({tuple(map(str, options.values())) for options in listed}) == len(listed) > 5
    wanted = streaming.run(trial).digest
    for options in (listed[0], listed[-1]):
        offload = {**trial.options["offload"], **options}
        outcome = streaming.run(dataclasses.replace(trial, options={**trial.options, "offload": offload}))
        assert outcome.details["policy"]["slots"] == options["slots"]
        assert outcome.digest == wanted


def test_the_automatic_policy_is_held_against_the_best_of_the_others(tmp_path: Path) -> None:
    listed = [{"policy": "manual", "slots": slots} for slots in range(1, 9)]

    def run(trial: Trial) -> Outcome:
        if trial.engine == "policies":
            return Outcome("policies", details={"policies": listed})
        slots: Any = trial.options["offload"].get("slots")
        tokens = 95 if slots == "auto" else 10 * slots
        return Outcome(trial.engine, tokens=tokens, seconds=1.0, details={"predicted": {"seconds": 2.0}})

    grid = measure_policies(tiny_trial(tmp_path, "flexbatch", PROMPTS), 4, run)
    assert [made.options["slots"] for made in grid.hand_made] == [1, 3, 6, 8]
    assert [made.options["slots"] for made in grid.best] == [8, 8, 8]
    assert len(grid.automatic) == 3
    assert grid.reached == 95 / 80


@pytest.mark.parametrize(("listed", "said"), [([], "none fits the limit"), ([{"slots": 1}], "out of memory")])
def test_a_grid_without_a_policy_that_runs_says_why(listed: list[Any], said: str, tmp_path: Path) -> None:
    def run(trial: Trial) -> Outcome:
        if trial.engine == "policies":
            return Outcome("policies", details={"policies": listed})
        return Outcome(trial.engine, error="out of memory")

    with pytest.raises(EngineError, match=said):
        measure_policies(tiny_trial(tmp_path, "flexbatch", PROMPTS), 4, run)


def test_a_choice_of_policies_is_spread_over_all() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]
