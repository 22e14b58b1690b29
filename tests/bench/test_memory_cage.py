"""The memory limit holds, and what it counts is what the child used."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexbatch.bench.launcher import Launcher
from flexbatch.bench.memory_cage import memory_cage
from flexbatch.bench.trial import Prompts
from flexbatch.bench.workloads import random_prompts
from tests.bench.support import tiny_trial

MIB = 1 << 20


def _take(nbytes: int) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import time; held = bytearray({nbytes}); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.5)",
    ]


def test_a_process_over_the_limit_is_killed_and_the_group_is_gone_afterwards() -> None:
    with memory_cage(100 * MIB) as cage:
        if cage.folder is None:
            pytest.skip(f"no memory cgroup here: {cage.how}")
        assert subprocess.run(cage.command(_take(50 * MIB)), check=False).returncode == 0
        assert not cage.was_killed
        assert subprocess.run(cage.command(_take(300 * MIB)), check=False).returncode != 0
        assert cage.was_killed
    assert not cage.folder.exists()


def test_the_peak_is_that_of_the_child() -> None:
    with memory_cage(400 * MIB) as cage:
        if cage.folder is None:
            pytest.skip(f"no memory cgroup here: {cage.how}")
        process = subprocess.Popen(cage.command(_take(200 * MIB)))
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, cage.usage(process.pid).anonymous or 0)
            time.sleep(0.05)
        assert 200 * MIB <= (cage.usage(process.pid).peak or 0) <= 400 * MIB
        assert 190 * MIB <= anonymous <= 260 * MIB


def test_without_a_limit_nothing_is_done() -> None:
    with memory_cage(0) as cage:
        assert cage.command(["true"]) == ["true"]


def test_a_child_that_dies_is_an_outcome_with_its_last_words(tmp_path: Path) -> None:
    trial = tiny_trial(tmp_path, "no-such-engine", random_prompts(1, 4, 100))
    outcome = Launcher(tmp_path, timeout=60).run(trial)
    assert outcome.rate == 0
    assert "KeyError" in outcome.error


def test_a_child_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    outcome = Launcher(tmp_path, timeout=0.2).run(tiny_trial(tmp_path, "transformers", Prompts(((5, 6, 7),))))
    assert "given up" in outcome.error
