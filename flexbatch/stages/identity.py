"""The run's fingerprint: everything that changes results, and nothing that does not (tiers, memory, log level)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flexbatch.config import Config
from flexbatch.stages.model import Model
from flexbatch.stages.work import Work


def fingerprint(config: Config, model: Model, work: Work) -> dict[str, Any]:
    """Nested, so that a refusal can name the keys that differ."""
    return {
        "model": model.fingerprint(),
        "job": {"kind": config.job.kind, **work.identity},
        "generation": asdict(config.generation),
        "offload": {
            "weight_bits": config.offload.weight_bits,
            "kv_bits": config.offload.kv_bits,
            "compute": config.offload.compute,
        },
        "output": {
            "columns": list(config.output.columns),
            "part_rows": work.part_rows,
            "window": work.window,
        },
    }
