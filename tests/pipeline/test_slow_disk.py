"""A disk that slows to a crawl slows the job, which says so; the rows are the same."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from flexbatch import pipeline
from flexbatch.composition import load_config
from flexbatch.interrupt import StopSignal
from flexbatch.memory.direct_io import AlignedBuffer, BufferedReader
from tests.pipeline.conftest import write_rows
from tests.pipeline.jobs import output_rows, overrides


def test_the_progress_says_how_slow_the_disk_is_and_what_was_counted_on(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_rows(tmp_path / "data", shards=1, rows=6)
    options = {
        "generation__max_new_tokens": 4,
        "offload__policy": "manual",
        "offload__percent": "[0,0,100,0,100,0]",
    }

    def run(name: str) -> str:
        pipeline.run(load_config(overrides(small_model, dataset, tmp_path / name, **options)), stop=StopSignal())
        return capsys.readouterr().err

    run("quick")
    read = BufferedReader.read

    def slow(
        self: BufferedReader, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int
    ) -> int:
        time.sleep(nbytes / 1e6)  # some seconds a pass: the first line of progress comes after five
        return read(self, file, offset, nbytes, buffer, buffer_offset)

    monkeypatch.setattr(BufferedReader, "read", slow)
    said = run("slow")
    assert "waiting for weights from disk at " in said
    assert re.search(r"MB/s; the plan counts on [\d,]+", said)
    assert output_rows(tmp_path / "slow") == output_rows(tmp_path / "quick")
