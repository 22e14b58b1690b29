"""Work that leaves memory behind, done by another process that ends with it.

A compiler keeps what it has read and built, and a heap what lies between blocks that are still in use: 120 MiB where a
run's kernels are compiled, 250 where the machine is measured. Under a limit that room is missing to the end of the job.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from flexbatch.torch_environment import prepare_torch

Result = TypeVar("Result")

_INTERRUPTED = 130
_FIRST_TO_GO = "1000"


class WorkFailed(Exception):
    """The other process brought no result; `was_killed` where the system ended it, as it does for want of memory."""

    def __init__(self, message: str, *, was_killed: bool = False) -> None:
        super().__init__(message)
        self.was_killed = was_killed


def in_own_process(work: Callable[..., Result], *given: Any) -> Result:
    """`work(*given)` in a Python process of its own, which ends when this one does; all of it can be pickled. What it
    prints goes to standard error. Where memory runs out, the system is to end that process rather than this one.

    Raises:
        WorkFailed: it raised something, or could not be started, or was ended.
        KeyboardInterrupt: it was interrupted.
    """
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    told = b""
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "flexbatch.memory.own_process"],  # this flexbatch, whatever the folder holds
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(pickle.dumps((work, given)))
                process.stdin.flush()
                told = process.stdout.read()
    except OSError as error:
        raise WorkFailed(f"No process could be started: {error}") from error
    if process.returncode in (_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if process.returncode or not told:
        raise WorkFailed(f"It ended with {process.returncode}", was_killed=process.returncode == -signal.SIGKILL)
    result, failure = pickle.loads(told)
    if failure:
        raise WorkFailed(failure)
    made: Result = result
    return made


def _main() -> None:
    """The other process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)  # proc(5)
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    prepare_torch()
    work, given = pickle.load(sys.stdin.buffer)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up whoever ends it
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    try:
        told = (work(*given), "")
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - told to the other process
        told = (None, f"{type(error).__name__}: {error}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the other may end as soon as it has read the answer
    with os.fdopen(answer, "wb") as stream:
        pickle.dump(told, stream)
    os._exit(0)  # native libraries' threads are not waited for


def _end_with_the_other() -> None:
    """Its end of the pipe closes when it ends, however it does."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _main()
