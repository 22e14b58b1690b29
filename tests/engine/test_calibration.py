"""The machine is measured once, its figures are possible ones, and a damaged record of them is no obstacle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from flexbatch.engine import calibration, measurement, present_speed, product_rates, timing
from flexbatch.engine.calibration import check_device, familiar_hardware, in_this_process, measure_hardware
from flexbatch.engine.present_speed import Speed, at_speed
from flexbatch.engine.rehearsal import half_type
from flexbatch.engine.timing import medians, seconds_of
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.memory import heap
from flexbatch.plan.hardware import profile_to_mapping
from tests.plan.examples import machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(present_speed, "LOOKS", 1)


@dataclass
class Fixed:
    """Work of a known rate."""

    amount: float

    def rate(self, _at_least: float) -> float:
        return self.amount


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


def test_a_slow_hour_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = profile_to_mapping(machine("cpu-2core"))
    calibration._keep(recorded(tmp_path), calibration.machine_identity(CPU, tmp_path), measured)
    before = machine("cpu-2core")
    half = str(half_type(CPU)).removeprefix("torch.")
    rates = {
        "gemm_works": {256: Fixed(0.5 * before.gemm_rate(half, 256))},
        "int8_works": {256: Fixed(1.1 * before.gemm_rate("int8", 256))},
        "decode_attention_work": Fixed(2.0 * before.attention_bytes),
    }
    for name, made in rates.items():
        monkeypatch.setattr(present_speed, name, lambda *_, made=made: made)
    profile = measure_hardware(CPU, tmp_path, tmp_path)
    assert profile.gemm_rate("bfloat16", 64) == pytest.approx(0.5 * before.gemm_rate("bfloat16", 64))
    assert profile.gemm_rate("int8", 64) == before.gemm_rate("int8", 64)  # so little is chance
    assert profile.attention_bytes == pytest.approx(2.0 * before.attention_bytes)
    assert profile.layer_call_seconds == pytest.approx(0.5 * before.layer_call_seconds)
    assert profile.disk_read == before.disk_read


def test_a_slow_second_is_not() -> None:
    assert present_speed.agreed([0.4, 0.97, 0.5]) == 1.0
    assert present_speed.agreed([0.4, 1.6]) == 1.0
    assert present_speed.agreed([0.4, 0.7, 0.5]) == 0.7
    assert present_speed.agreed([1.9, 1.4]) == 1.4


def test_a_look_at_the_machine_gives_possible_factors() -> None:
    before = machine("cpu-2core")
    now = at_speed(before, present_speed.present_speed(before))
    again = at_speed(now, Speed(1.0, 1.0, 1.0))
    assert again == now
    for kind in ("bfloat16", "int8"):
        assert 1e9 < now.gemm_rate(kind, 256) < 1e14


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
    assert medians(rounds) == {"disk": 3.0, "gemm": {16: 6.0}}


@pytest.mark.slow
def test_a_measurement_gives_possible_figures_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "FILE_BYTES", 64 << 20)
    monkeypatch.setattr(product_rates, "ROWS", (1, 64, 256))
    for module in (measurement, product_rates):
        monkeypatch.setattr(module, "HIDDEN", 1024)
    rates = measurement.measure_rates(CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []
    profile = calibration._profile(rates, CPU, tmp_path, "here")
    assert profile.gemm_rate("bfloat16", 1024) > 1e9
    assert profile.disk_read > 1e6


def test_a_run_counts_its_own_process_on_a_described_machine_but_not_on_an_accelerator() -> None:
    small = machine("cpu-2core", process_bytes=1 << 20)
    assert in_this_process(small).process_bytes > psutil.Process().memory_info().rss
    large = machine("cpu-2core", process_bytes=1 << 36, device_memory=1 << 40)
    assert in_this_process(large) == large
    assert in_this_process(machine("t4-gcp")) == machine("t4-gcp")


@pytest.mark.skipif(heap._malloc_trim() is None, reason="no glibc, or no /proc")
def test_what_a_measurement_has_left_behind_is_not_taken_for_the_process() -> None:
    """Freed blocks between others, and what only the garbage collector finds."""
    described = machine("cpu-2core", process_bytes=1)
    before = in_this_process(described).process_bytes
    blocks: list[object] = [torch.ones(16 << 10) for _ in range(4000)]
    others, blocks = blocks[::2], blocks[1::2]
    blocks.append(blocks)
    del blocks, others[1:]
    assert in_this_process(described).process_bytes - before < 32 << 20


def test_a_limit_below_what_the_process_itself_takes_is_said_in_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration, "memory_limit", lambda: 100 << 20)
    with pytest.raises(CapacityError, match=r"takes [\d.]+[MG]iB by itself.* only 100MiB of main memory") as caught:
        familiar_hardware(CPU, tmp_path, tmp_path, profile_to_mapping(machine("cpu-2core")))
    assert "limit" in caught.value.remedy


@pytest.mark.parametrize("held_up", [(0,), (1,), (0, 2)])
def test_work_is_not_taken_for_what_its_first_calls_took(
    held_up: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of calls that compile, find memory or are held up by others, none is the measurement."""
    calls, now = count(), [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work() -> None:
        now[0] += 0.15 if next(calls) in held_up else 0.001

    assert seconds_of(work, CPU) == pytest.approx(0.001)
