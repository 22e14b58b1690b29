"""Work in a process of its own: what comes back, what does not, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexbatch.memory.own_process import WorkFailed, in_own_process

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


def multiplied(numbers: list[int], factor: int) -> tuple[int, list[int]]:
    print("what it prints is no answer")
    return os.getpid(), [factor * number for number in numbers]


def refused() -> None:
    raise ValueError("no such machine")


def ended(by: int) -> None:
    os.kill(os.getpid(), by)


def first_to_go() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


def wait_for_ever(told: str) -> None:
    try:
        Path(told).write_text(str(os.getpid()))
        time.sleep(600)
    finally:
        Path(told).write_text("cleaned up")


def test_a_result_comes_from_another_process_whatever_it_prints() -> None:
    process, made = in_own_process(multiplied, [1, 2, 3], 7)
    assert made == [7, 14, 21]
    assert process != os.getpid()


def test_it_is_this_flexbatch_that_works_whatever_is_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flexbatch").mkdir()
    (tmp_path / "flexbatch/__init__.py").write_text("raise RuntimeError('another one')")
    monkeypatch.chdir(tmp_path)
    assert in_own_process(multiplied, [1], 2)[1] == [2]


def test_what_it_raises_is_told() -> None:
    with pytest.raises(WorkFailed, match="ValueError: no such machine") as caught:
        in_own_process(refused)
    assert not caught.value.was_killed


def test_it_is_the_first_to_go_when_memory_runs_out_and_that_is_told() -> None:
    assert in_own_process(first_to_go) == 1000
    with pytest.raises(WorkFailed) as caught:
        in_own_process(ended, signal.SIGKILL)
    assert caught.value.was_killed


def test_an_interrupt_of_it_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        in_own_process(ended, signal.SIGINT)


def test_without_a_python_to_start_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkFailed, match="No process could be started"):
        in_own_process(first_to_go)


def test_it_cleans_up_and_ends_when_the_process_that_asked_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    asking = (
        "from flexbatch.memory.own_process import in_own_process; from tests.memory.test_own_process import *; "
        f"in_own_process(wait_for_ever, {str(told)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", asking]) as process:
        until(lambda: told.exists() and told.read_text().isdigit())
        process.kill()
    until(lambda: told.read_text() == "cleaned up")


def until(holds: object, seconds: float = 60.0) -> None:
    assert callable(holds)
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
