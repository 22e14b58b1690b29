"""A hardware file is complete and possible, or is refused with the key that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flexbatch.errors import ConfigError
from flexbatch.plan.hardware import profile_from_mapping, profile_to_mapping

FOLDER = Path(__file__).parents[2] / "conf" / "hardware"
SHIPPED = [file for file in sorted(FOLDER.glob("*.yaml")) if file.stem != "auto"]


def figures(name: str = "t4-gcp") -> dict[str, Any]:
    profile: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["profile"]
    return profile


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_machine_is_valid_and_survives_writing(file: Path) -> None:
    profile = profile_from_mapping(figures(file.stem), where=str(file))
    assert profile.name == file.stem
    assert profile_from_mapping(profile_to_mapping(profile), where="again") == profile


def test_the_paper_machine_has_the_paper_figures() -> None:
    t4 = profile_from_mapping(figures(), where="t4")
    assert (t4.device_memory, t4.disk_space) == (15 << 30, 1_500_000_000_000)
    assert (t4.host_to_device, t4.device_to_host, t4.disk_write) == (1.29e10, 4.8e9, 1e9)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("disk_read", None, "disk_read is missing"),
        ("disk_read", -1, "disk_read is -1"),
        ("disk_read", 0, "disk_read is 0"),
        ("memory_copy", "fast", "memory_copy is 'fast', which is not a number"),
        ("cores", float("nan"), "cores is nan"),
        ("host_memory", 0, "host_memory is 0"),
        ("device_memory", "15 parsecs", "device_memory"),
        ("process_bytes", "99GiB", "process_bytes is not smaller"),
        ("device", "abacus", "device is 'abacus'"),
        ("gemm", {}, "gemm is {}"),
        ("gemm", {"float7": {1: 1e9}}, "gemm.float7"),
        ("gemm", {"float16": {0: 1e9}}, "gemm.float16"),
        ("gemm", {"float16": {1: -3.0}}, "gemm.float16.1 is -3.0"),
        ("disk_reed", 1e9, "did you mean disk_read"),
    ],
)
def test_a_wrong_figure_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match="the-file") as raised:
        profile_from_mapping({**figures(), key: value}, where="the-file")
    assert said in str(raised.value)


def test_rates_between_the_points_lie_between_them_and_never_fall_below_one_row() -> None:
    profile = profile_from_mapping({**figures(), "gemm": {"float16": {1: 1e9, 64: 4e9}}}, where="x")
    rates = [profile.gemm_rate("float16", rows) for rows in (1, 2, 8, 40, 64, 1000)]
    assert rates == sorted(rates)
    assert rates[0] == 1e9
    assert rates[-1] == 4e9
