"""The jobs' sample shards are small Arrow IPC files of the documented schema, and can be made anew."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from flexbatch.embedded.instances import Instance, held_out
from flexbatch.embedded.shards import tables, write

JOBS = Path(__file__).parents[2] / "jobs"
MADE = tables()


def read(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_committed_shard_is_what_its_generator_makes(name: str) -> None:
    assert read(JOBS / name).equals(MADE[name])


def test_writing_again_gives_the_same_tables(tmp_path: Path) -> None:
    write(tmp_path)
    assert all(read(tmp_path / name).equals(table) for name, table in MADE.items())


@pytest.mark.parametrize("name", sorted(name for name in MADE if name.startswith("helm_eval")))
def test_a_scenario_has_shots_and_held_out_questions_with_one_right_answer(name: str) -> None:
    rows = read(JOBS / name).to_pylist()
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["correct"].count(True) == 1
        assert len(row["correct"]) == len(row["references"])
        instance = Instance(row["input"], tuple(row["references"]), row["correct"].index(True))
        assert held_out(instance) == (row["split"] == "test")


def test_all_sample_data_stays_below_two_megabytes() -> None:
    assert sum(file.stat().st_size for file in JOBS.rglob("*") if file.is_file()) < 2_000_000
