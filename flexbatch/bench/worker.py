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
from flexbatch.torch_environment import prepare_torch

# Module and function, `function(trial) -> Outcome`; imported one at a time, because each imports much.
ENGINES = {
    "flexbatch": ("streaming", "run"),
    "accelerate": ("accelerate_disk", "run"),
    "transformers": ("transformers_memory", "run"),
    "ctranslate2": ("ctranslate2_memory", "run"),
    "ctranslate2-conversion": ("ctranslate2_memory", "convert"),
    "deepspeed": ("deepspeed_disk", "run"),
    "policies": ("hand_made", "run"),
    "roofline": ("machine_limits", "run"),
    "checkpoint": ("checkpoint_maker", "run"),
}
AS_IN_A_RUN = ("flexbatch", "policies", "roofline")
"""For which torch is prepared as `flexbatch run` does it; for a peer it is as it would be by itself."""


def main(arguments: Sequence[str]) -> int:
    engine, record, answer = arguments
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    if engine in AS_IN_A_RUN:
        prepare_torch()
    trial = read_trial(Path(record))
    try:
        module, function = ENGINES[engine]
        outcome: Outcome = getattr(importlib.import_module(f"flexbatch.bench.engines.{module}"), function)(trial)
    except FlexbatchError as error:
        outcome = Outcome(engine, rows=trial.rows, batch=trial.batch, error=" ".join(str(error).split()))
    write_record(Path(answer), dataclasses.replace(outcome, engine=engine, peak_resident=peak_resident_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
