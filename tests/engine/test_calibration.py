"""The machine is measured once, its figures are possible ones, and a damaged record of them is no obstacle."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from flexbatch.engine import calibration, measurement
from flexbatch.engine.calibration import check_device, familiar_hardware, in_this_process, measure_hardware
from flexbatch.errors import ConfigError
from flexbatch.plan.hardware import profile_to_mapping
from tests.plan.examples import machine

CPU = torch.device("cpu")


def recorded(folder: Path) -> Path:
    """A record of this machine as a measurement leaves it, with the rates of the shipped two-core machine."""
    identity = calibration.machine_identity(CPU, folder)
    file = folder / f"hardware-{calibration._digest(identity)}.json"
    figures = profile_to_mapping(machine("cpu-2core", disk_read=123e6))
    calibration._keep(file, identity, figures)
    return file


def test_a_measured_machine_is_not_measured_again(tmp_path: Path) -> None:
    recorded(tmp_path)
    profile = measure_hardware(CPU, tmp_path, tmp_path)
    assert profile.disk_read == 123e6
    assert profile.gemm_rate("bfloat16", 512) > profile.gemm_rate("bfloat16", 1)


def test_free_memory_is_looked_up_and_not_remembered(tmp_path: Path) -> None:
    recorded(tmp_path)
    profile = measure_hardware(CPU, tmp_path, tmp_path)
    assert profile.host_memory == 0
    assert 0 < profile.process_bytes < profile.device_memory
    assert profile.device_memory != machine("cpu-2core").device_memory


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"machine": 7, "rates": {}}'])
def test_a_damaged_or_foreign_record_is_not_believed(tmp_path: Path, damage: str) -> None:
    file = recorded(tmp_path)
    file.write_text(damage)
    typical = profile_to_mapping(machine("cpu-2core", disk_read=5e8))
    assert familiar_hardware(CPU, tmp_path, tmp_path, typical).disk_read == 5e8


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    file = recorded(tmp_path)
    assert set(json.loads(file.read_text())) == {"machine", "rates"}
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"offload\.device is mps|offload\.device is cuda"):
        check_device(torch.device("mps") if torch.cuda.is_available() else torch.device("cuda:0"))


def test_of_several_measurements_each_figure_is_the_middle_one() -> None:
    rounds = [{"disk": disk, "gemm": {16: disk * 2.0}} for disk in (9.0, 1.0, 3.0)]
    assert measurement.medians(rounds) == {"disk": 3.0, "gemm": {16: 6.0}}


@pytest.mark.slow
def test_a_measurement_gives_possible_figures_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = {"FILE_BYTES": 64 << 20, "ROWS": (1, 64, 256), "HIDDEN": 1024}
    for name, fewer in smaller.items():
        monkeypatch.setattr(measurement, name, fewer)
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    profile = measure_hardware(CPU, disk, cache)
    assert list(disk.iterdir()) == []
    assert len(list(cache.iterdir())) == 1
    assert profile.gemm_rate("bfloat16", 1024) > 1e9
    assert profile.disk_read > 1e6


def test_a_run_counts_its_own_process_on_a_described_machine_but_not_on_an_accelerator() -> None:
    small = machine("cpu-2core", process_bytes=1 << 20)
    assert in_this_process(small).process_bytes > psutil.Process().memory_info().rss
    large = machine("cpu-2core", process_bytes=1 << 36, device_memory=1 << 40)
    assert in_this_process(large) == large
    assert in_this_process(machine("t4-gcp")) == machine("t4-gcp")
