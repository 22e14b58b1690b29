"""Runs a trial in a fresh process under the memory limit, and watches what it takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from flexbatch.bench.memory_cage import Cage, memory_cage
from flexbatch.bench.page_cache import drop_page_cache
from flexbatch.bench.trial import Outcome, Trial, read_outcome, write_record

WATCH_SECONDS = 0.1
LOG_LINES = 4


@dataclasses.dataclass(frozen=True)
class Launcher:
    """`folder` takes every trial's record, answer and log; `conditions` collects how memory and cache were held."""

    folder: Path
    timeout: float
    conditions: set[str] = dataclasses.field(default_factory=set)

    def run(self, trial: Trial) -> Outcome:
        """What came of the trial; a run that failed is an outcome with `error`."""
        number = len(list(self.folder.glob("*.trial.json")))
        base = self.folder / f"{number:03d}-{trial.engine}"
        record, answer, log = (base.with_suffix(f".{kind}") for kind in ("trial.json", "outcome.json", "log"))
        write_record(record, trial)
        self.conditions.add(drop_page_cache(sorted(Path(trial.model).glob("*.safetensors"))))
        with memory_cage(trial.limit) as cage:
            if trial.limit:
                self.conditions.add(f"memory limit by {cage.how}")
            return self._watched(trial, cage, record, answer, log)

    def _watched(self, trial: Trial, cage: Cage, record: Path, answer: Path, log: Path) -> Outcome:
        command = cage.command([sys.executable, "-m", "flexbatch.bench.worker", trial.engine, str(record), str(answer)])
        started, peak, anonymous, given_up = time.monotonic(), 0, 0, False
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
            try:
                while process.poll() is None:
                    usage = cage.usage(process.pid)
                    peak, anonymous = max(peak, usage.peak or 0), max(anonymous, usage.anonymous or 0)
                    if time.monotonic() - started > self.timeout:
                        given_up = True
                        break
                    time.sleep(WATCH_SECONDS)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        peak = max(peak, cage.usage(process.pid).peak or 0)
        if given_up:
            error = f"given up after {self.timeout:g} s (bench.timeout)"
        elif answer.is_file():
            return dataclasses.replace(read_outcome(answer), peak=peak, peak_anonymous=anonymous)
        elif cage.was_killed:
            error = f"killed by the kernel: over the memory limit of {trial.limit / 2**30:.2f} GiB"
        else:
            error = f"ended with code {process.returncode}: {_last_lines(log)}"
        return Outcome(
            trial.engine, rows=trial.rows, batch=trial.batch, error=error, peak=peak, peak_anonymous=anonymous
        )


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "it said nothing"
