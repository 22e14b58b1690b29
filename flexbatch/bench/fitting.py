"""Whether an engine that keeps the whole model in memory has room for it, before it tries."""

from __future__ import annotations

from pathlib import Path

from flexbatch.bench.trial import Trial
from flexbatch.errors import CapacityError


def require_room(trial: Trial, engine: str) -> None:
    """CapacityError where the checkpoint alone is as large as the limit."""
    size = sum(file.stat().st_size for file in Path(trial.model).glob("*.safetensors"))
    if trial.limit and size >= trial.limit:
        raise CapacityError(
            f"{engine} keeps the whole model in memory: {size / 2**30:.2f} GiB do not fit into "
            f"{trial.limit / 2**30:.2f} GiB."
        )
