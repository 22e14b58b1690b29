"""Engines that keep the whole model in memory: whether there is room for it, before they try."""

from __future__ import annotations

from pathlib import Path

from flexbatch.bench.trial import Trial

WHOLE_MODEL = ("transformers", "ctranslate2")


def why_no_room(trial: Trial) -> str:
    """Why the trial's engine cannot run under its limit; empty where the weights leave room for something more."""
    if trial.engine not in WHOLE_MODEL or not trial.limit:
        return ""
    size = sum(file.stat().st_size for file in Path(trial.model).glob("*.safetensors"))
    if size < trial.limit:
        return ""
    return (
        f"not run: it keeps the whole model in memory, and {size / 2**30:.2f} GiB do not fit into "
        f"{trial.limit / 2**30:.2f} GiB"
    )
