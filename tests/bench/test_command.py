"""The verb, from the command line to the last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexbatch.bench.command import model_folder
from flexbatch.bench.scaling import further, summary, write_rows
from flexbatch.composition import load_config
from flexbatch.errors import ConfigError
from tests.bench.support import FIELDS
from tests.conftest import REPOSITORY


def _bench(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexbatch", "bench", *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_last_line_is_one_json_object_with_every_engine(tmp_path: Path) -> None:
    ran = _bench(
        "model=hf", "model.path=none", f"model.config={json.dumps(FIELDS)}", f"model.cache_dir={tmp_path}",
        "model.dtype=float32", "bench.rows=4", "bench.prompt_tokens=24", "bench.new_tokens=8", "bench.memory=2GiB",
        "bench.peers=[transformers]", "bench.batches=[4]",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.strip().splitlines()[-1])
    engines = {entry["engine"]: entry for entry in result["engines"]}
    assert set(engines) == {"flexbatch", "transformers"}
    assert all("runs" in entry for entry in engines.values()), result["engines"]
    assert all(entry["runs"][0]["tokens"] == 4 * 8 for entry in engines.values())
    assert engines["flexbatch"]["digest"] == engines["transformers"]["digest"]
    assert engines["transformers"]["flexbatch_is_times_faster"] > 0
    before, after = result["limits"]
    assert before["disk_read"] > 0
    assert after["disk_read"] > 0
    assert any("memory" in condition or "LIMIT" in condition for condition in result["conditions"])


def _scaling(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What the scaling benchmark says of each number of rows."""
    ran = _bench(
        "bench.workload=scaling", "model=opt-tiny", f"model.cache_dir={folder}", "bench.prompt_tokens=64", *overrides
    )
    assert ran.returncode == 0, ran.stderr
    scaling: list[dict[str, Any]] = json.loads(ran.stdout.strip().splitlines()[-1])["scaling"]
    return scaling


@pytest.mark.slow
def test_scaling_says_what_each_further_row_costs(tmp_path: Path) -> None:
    small, large = _scaling(tmp_path, "bench.row_counts=[4,12]", "bench.new_tokens=2")
    assert (small["rows"], large["rows"]) == (4, 12)
    assert small["milliseconds_per_further_row"] is None
    assert large["peak_resident_bytes"] > 0


@pytest.mark.slow
def test_ten_times_a_thousand_rows_take_no_more_memory(tmp_path: Path) -> None:
    few, many = _scaling(tmp_path, "bench.row_counts=[1000,10000]", "bench.new_tokens=8")
    # Rows read ahead are all there only from some thousands on, and other samples of lengths tip close plans: a tenth.
    assert many["peak_resident_bytes"] <= 1.1 * few["peak_resident_bytes"]


def test_a_model_of_unknown_shape_is_refused_with_a_remedy(tmp_path: Path) -> None:
    config = load_config(["model=hf", f"model.path={tmp_path / 'nothing'}"])
    with pytest.raises(ConfigError, match=r"model=opt-1\.3b"):
        model_folder(config, "bfloat16")


def test_models_of_different_shape_or_type_get_different_folders() -> None:
    small, large = load_config(["model=opt-1.3b"]), load_config(["model=opt-6.7b"])
    folders = {model_folder(small, "bfloat16"), model_folder(small, "float32"), model_folder(large, "bfloat16")}
    assert len(folders) == 3


def test_a_further_row_costs_what_the_longer_run_took_more() -> None:
    assert further({"rows": 100, "seconds": 2.0}, 300, 3.0) == pytest.approx(5.0)
    assert further(None, 300, 3.0) is None


def test_a_scaling_run_is_the_median_of_its_repeats_and_the_highest_of_their_peaks() -> None:
    small, large = summary({300: [(3.0, 7), (9.0, 5), (4.0, 6)], 100: [(2.0, 1), (1.0, 1), (3.0, 1)]})
    assert (small["rows"], small["seconds"]) == (100, 2.0)
    assert (large["seconds"], large["peak_resident_bytes"]) == (4.0, 7)
    assert large["milliseconds_per_further_row"] == pytest.approx(10.0)


def test_rows_are_the_same_each_time(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 20)
    write_rows(tmp_path / "b.jsonl", 40)
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert (tmp_path / "a.jsonl").read_text().splitlines() == lines[:20]
    assert all(10 < len(json.loads(line)["text"].split()) < 45 for line in lines)
