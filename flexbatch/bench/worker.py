"""The child process: `python -m flexbatch.bench.worker ENGINE TRIAL.json ANSWER.json` runs one engine once."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexbatch.bench.trial import Outcome, read_trial, write_record
from flexbatch.errors import FlexbatchError
from flexbatch.memory.main_memory import peak_resident_bytes

# Each module has `run(trial) -> Outcome`. It raises NotRunError for an engine that cannot run here.
ENGINES = {
    "flexbatch": "flexbatch.bench.engines.streaming",
    "accelerate": "flexbatch.bench.engines.accelerate_disk",
    "transformers": "flexbatch.bench.engines.transformers_memory",
    "ctranslate2": "flexbatch.bench.engines.ctranslate2_memory",
    "deepspeed": "flexbatch.bench.engines.deepspeed_disk",
    "roofline": "flexbatch.bench.engines.machine_limits",
    "checkpoint": "flexbatch.bench.engines.checkpoint_maker",
}


def main(arguments: Sequence[str]) -> int:
    engine, record, answer = arguments
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    trial = read_trial(Path(record))
    try:
        outcome: Outcome = importlib.import_module(ENGINES[engine]).run(trial)
    except FlexbatchError as error:
        outcome = Outcome(engine, rows=trial.rows, batch=trial.batch, error=" ".join(str(error).split()))
    write_record(Path(answer), dataclasses.replace(outcome, engine=engine, peak_resident=peak_resident_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
