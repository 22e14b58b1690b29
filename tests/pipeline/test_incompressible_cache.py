"""A model whose keys do not fit into a compressed cache costs a pass and a message, and gets a plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexbatch import pipeline
from flexbatch.composition import load_config
from flexbatch.integrations.session import Session
from flexbatch.interrupt import StopSignal
from flexbatch.records import Request, Sampling
from tests.engine.families import prompts, saved
from tests.engine.test_compressed_cache import with_small_keys
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides

OPTIONS = {"model.dtype": "bfloat16", "offload.compressed_cache": "always", "hardware": "cpu-2core-amx"}


@pytest.fixture
def wide_model(tmp_path: Path, small_model: Path) -> Path:
    """With the tokenizer of the small one, and keys of all sizes."""
    folder = with_small_keys(saved("opt-wide"), tmp_path / "wide")
    for file in small_model.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_job_goes_on_with_a_plain_cache(
    wide_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output = write_rows(tmp_path / "data", shards=2, rows=12), tmp_path / "run"
    arguments = overrides(wide_model, dataset, output, generation__max_new_tokens=5)
    arguments += [f"{key}={value}" for key, value in OPTIONS.items()]
    pipeline.run(load_config(arguments), stop=StopSignal())
    assert "cannot be kept compressed" in capsys.readouterr().err
    assert not json.loads((output / "_state" / "plan.json").read_text())["policy"]["compressed_cache"]
    rows = output_rows(output)
    plain = tmp_path / "plain"
    never = [f"output.dir={plain}" if each.startswith("output.dir") else each for each in arguments]
    pipeline.run(load_config([*never, "offload.compressed_cache=never"]), stop=StopSignal())
    assert "cannot be" not in capsys.readouterr().err
    assert rows == output_rows(plain)
    assert len(rows) == 12


def test_a_session_goes_on_too(wide_model: Path) -> None:
    session = Session.open(str(wide_model), *(f"{key}={value}" for key, value in OPTIONS.items()))
    asked = [Request(index, row, Sampling(max_new_tokens=4)) for index, row in enumerate(prompts(5))]
    assert [len(done.token_ids) for done in session.answer(asked)] == [4] * 5
