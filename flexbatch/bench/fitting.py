"""Engines that keep the whole model in memory: whether there is room for it, before they try."""

from __future__ import annotations

import json
from pathlib import Path

from flexbatch.bench.trial import Trial

WHOLE_MODEL = ("transformers", "ctranslate2")


def why_no_room(trial: Trial) -> str:
    """Why the trial's engine cannot run under its limit; empty where the weights leave room for something more."""
    if trial.engine not in WHOLE_MODEL or not trial.limit:
        return ""
    size = sum(file.stat().st_size for file in Path(trial.model).glob("*.safetensors"))
    if trial.dtype == "float32" and _is_stored_in_half(Path(trial.model)):
        size *= 2
    if size < trial.limit:
        return ""
    return (
        f"not run: it keeps the whole model in memory, and {size / 2**30:.2f} GiB do not fit into "
        f"{trial.limit / 2**30:.2f} GiB"
    )


def _is_stored_in_half(model: Path) -> bool:
    fields = json.loads((model / "config.json").read_text())
    return fields.get("dtype", fields.get("torch_dtype")) in ("bfloat16", "float16")
