"""The command line as a user meets it: a process of its own, its exit code, its two streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexbatch import __version__

REPOSITORY = Path(__file__).resolve().parent.parent


def flexbatch(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexbatch", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["promt.template=x"], 2, "Did you mean prompt.template?"),
        (["model=opt-12b"], 2, "Did you mean opt-13b?"),
        (["stauts"], 2, "Did you mean status?"),
        (["--frobnicate"], 2, "--frobnicate"),
        (["--multirun"], 2, "shell loop"),
        (["--config-dir", "nowhere"], 2, "nowhere"),
        (["status", "nowhere"], 2, "nowhere"),
        (["status", "."], 6, "_state"),
        (["report", "."], 6, "_state"),
        (["report"], 2, "report DIR"),
        (["offload.policy=manual", "offload.percent=[60,50,0,0,0,0]"], 2, "at most 100"),
    ],
)
def test_bad_input_gets_a_few_lines_and_an_exit_code(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    finished = flexbatch(*arguments, cwd=tmp_path)
    assert finished.returncode == code
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.splitlines()) <= 3
    assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing is half-written"


def test_the_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    finished = flexbatch("promt.template=x", cwd=tmp_path, FLEXBATCH_TRACEBACK="1")
    assert finished.returncode == 2
    assert "Traceback" in finished.stderr
    assert "find_key" in finished.stderr


def test_help_lists_verbs_and_every_option(tmp_path: Path) -> None:
    finished = flexbatch("--help", cwd=tmp_path)
    assert finished.returncode == 0
    for word in ("plan", "opt-175b", "generation.max_new_tokens", "prompt.template", "offload.percent"):
        assert word in finished.stdout


def test_the_version_is_said(tmp_path: Path) -> None:
    assert flexbatch("--version", cwd=tmp_path).stdout == f"flexbatch {__version__}\n"


def test_the_composed_configuration_is_printed_and_nothing_is_run(tmp_path: Path) -> None:
    (tmp_path / "conf" / "job").mkdir(parents=True)
    (tmp_path / "conf" / "job" / "mine.yaml").write_text("name: mine\nkind: generate\n")
    arguments = ["--config-dir=conf", "--cfg", "job", "job=mine", "model=opt-125m", "dataset.path=x.csv"]
    finished = flexbatch(*arguments, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "path: x.csv" in finished.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m flexbatch --help | head -1"
    finished = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""


STOPPABLE = """
import sys, time
from flexbatch.interrupt import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    if sys.argv[1:] == ["hang"]:
        time.sleep(60)
    stop.check()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends_at_once(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, "hang"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - started < 10
        assert "once more to stop at once" in process.stderr.read()


def test_status_and_help_start_without_torch(tmp_path: Path) -> None:
    code = "import sys; from flexbatch.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0


def test_a_command_that_is_done_does_not_wait_for_threads_of_libraries() -> None:
    script = (
        "import threading, time; from flexbatch.__main__ import leave\n"
        "threading.Thread(target=time.sleep, args=(60,)).start(); print('all said'); leave(5)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (5, "all said\n")
