"""Memory that runs out under way is met by fewer slots, once, with a message; the job goes on and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from flexbatch import pipeline
from flexbatch.composition import load_config
from flexbatch.engine.layer_store import LayerStore
from flexbatch.errors import CapacityError, FlexbatchError, OutOfMemory
from flexbatch.interrupt import StopSignal
from flexbatch.memory.tiers import TierBudget
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides

SLOTS = 8
JOB = {"generation__max_new_tokens": 8, "output__part_rows": 7, "offload__slots": SLOTS}


def run(small_model: Path, dataset: Path, output: Path, **more: Any) -> list[dict[str, Any]]:
    arguments = overrides(small_model, dataset, output, **{**JOB, **more})
    pipeline.run(load_config(arguments), stop=StopSignal())
    return output_rows(output)


def device_of(rows: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After so many writes of decoded tokens, more than `rows` rows at once are too many. Returns the sizes refused."""
    write, made, refused = LayerStore.write_column, [0], list[int]()

    def limited(self: LayerStore, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        made[0] += 1
        if made[0] > calls and keys.shape[0] > rows:
            refused.append(keys.shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        write(self, column, keys, values)

    monkeypatch.setattr(LayerStore, "write_column", limited)
    return refused


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data", shards=2, rows=30)


@pytest.fixture
def expected(small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """The rows of a run with memory in plenty."""
    rows = run(small_model, dataset, tmp_path / "plenty")
    capsys.readouterr()
    return rows


def test_the_job_goes_on_with_half_the_slots_and_the_same_rows(
    small_model: Path,
    dataset: Path,
    expected: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = device_of(SLOTS // 2, 40, monkeypatch)
    assert run(small_model, dataset, tmp_path / "scarce") == expected
    assert len(refused) == 1
    assert refused[0] > SLOTS // 2
    said = capsys.readouterr().err
    assert said.count("Memory ran out under way: CUDA out of memory. Tried to allocate 2.00 GiB.") == 1
    assert "The job goes on with 4 slots" in said
    plan = json.loads((tmp_path / "scarce" / "_state" / "plan.json").read_text())
    assert plan["policy"]["slots"] == SLOTS // 2


def test_a_limit_that_is_overrun_is_met_in_the_same_way(
    small_model: Path,
    dataset: Path,
    expected: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tier has less room than the plan was told."""
    reserve = TierBudget.reserve
    room = {"left": 3 * SLOTS * 2 * 64 * 4 * 60}  # three layers of the KV cache: enough for half the slots only

    def scarce(self: TierBudget, nbytes: int, what: str) -> None:
        if what == "KV cache":
            room["left"] -= nbytes
            if room["left"] < 0:
                room["left"] = 1 << 40
                raise CapacityError("The device tier has no room for KV cache.")
        reserve(self, nbytes, what)

    monkeypatch.setattr(TierBudget, "reserve", scarce)
    assert run(small_model, dataset, tmp_path / "scarce") == expected
    assert "The job goes on with 4 slots" in capsys.readouterr().err


def test_the_second_time_ends_the_run_which_the_same_command_goes_on_with(
    small_model: Path, dataset: Path, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as scarce:
        refused = device_of(1, 60, scarce)
        with pytest.raises(OutOfMemory, match="CUDA out of memory") as raised:
            run(small_model, dataset, tmp_path / "scarce")
        assert len(refused) == 2
        assert "offload.slots" in raised.value.remedy
        assert raised.value.exit_code == 7
    assert run(small_model, dataset, tmp_path / "scarce") == expected


def test_other_errors_are_not_taken_for_it(
    small_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(OPTDecoderLayer, "forward", broken)
    with pytest.raises((RuntimeError, FlexbatchError), match="shapes do not match") as raised:
        run(small_model, dataset, tmp_path / "run")
    assert not isinstance(raised.value, OutOfMemory)
