"""The reader that costs the least is chosen, and one slow moment does not choose another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.errors import ConfigError
from flexbatch.memory import reader_choice
from flexbatch.memory.direct_io import PAGE, ReadMeasurement
from flexbatch.memory.reader_choice import cheapest, choose_reader, fastest_rounds


def test_the_reader_is_the_one_asked_for_or_measured(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(64 << 20)
    assert choose_reader([large], "direct").kind == "direct"
    assert choose_reader([large], "buffered").kind == "buffered"
    measured = choose_reader([large], "auto", threads=2)
    assert {measurement.kind for measurement in measured.measurements} == {"direct", "buffered"}
    assert all(measurement.bytes_read and measurement.bytes_per_second for measurement in measured.measurements)
    with pytest.raises(ConfigError, match=r"offload\.reader"):
        choose_reader([large], "fast")


def measured(kind: str, gigabytes: float, nanoseconds: float) -> ReadMeasurement:
    return ReadMeasurement(kind, gigabytes * 1e9, nanoseconds * 1e-9, 1)


def test_a_pause_of_the_disk_in_one_round_does_not_decide_how_weights_are_read() -> None:
    rounds = [
        measured("direct", 0.4, 0.01),
        measured("buffered", 1.3, 0.35),
        measured("direct", 2.4, 0.01),
        measured("buffered", 1.2, 0.35),
    ]
    assert [each.bytes_per_second for each in fastest_rounds(rounds)] == [2.4e9, 1.3e9]
    assert cheapest(fastest_rounds(rounds)).kind == "direct"


def test_a_reader_must_bring_more_than_the_processor_time_that_it_takes() -> None:
    ways = measured("direct", 1.2, 0.01), measured("buffered", 1.3, 0.2 * torch.get_num_threads())
    assert cheapest(ways).kind == "direct"
    ways = measured("direct", 0.3, 0.01), measured("buffered", 1.3, 0.2 * torch.get_num_threads())
    assert cheapest(ways).kind == "buffered"


def test_that_weights_go_through_the_page_cache_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    large, rates = tmp_path / "large", {"direct": 0.3, "buffered": 1.3}
    with large.open("wb") as stream:
        stream.truncate(64 << 20)
    monkeypatch.setattr(reader_choice, "_measure", lambda reader, *_: measured(reader.kind, rates[reader.kind], 0.01))
    assert choose_reader([large]).kind == "buffered"
    assert "through the page cache" in caplog.text
    assert "direct 0.30 GB/s" in caplog.text
    caplog.clear()
    rates["direct"] = 2.4
    assert choose_reader([large]).kind == "direct"
    assert not caplog.text


def test_files_too_small_to_measure_are_not_measured(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(5 * PAGE + 123))
    assert choose_reader([small]).measurements == ()
