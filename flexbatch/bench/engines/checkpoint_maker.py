"""A checkpoint of random weights in Hugging Face layout, for engines that can only open a real one.

Every layer has bytes of its own, so nothing is read once and used for many layers. Written tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexbatch.bench.trial import Outcome, Trial
from flexbatch.checkpoint.architecture import config_from_mapping, expected_tensors
from flexbatch.checkpoint.shard_writer import PlannedShard, plan_shards, write_shard
from flexbatch.checkpoint.stored import StoredTensor
from flexbatch.errors import CapacityError

SHARD_BYTES = 2 << 30
DEVIATION = 0.02
"""Standard deviation of every matrix, as the published models are initialised."""


def run(trial: Trial) -> Outcome:
    """Makes the checkpoint `trial.model` from `options["config"]` (fields of a Transformers config)."""
    folder = Path(trial.model)
    make_checkpoint(folder, trial.options["config"], getattr(torch, trial.dtype))
    return Outcome(trial.engine, details={"vocabulary": vocabulary_of(folder), "weight_bytes": weight_bytes(folder)})


def make_checkpoint(folder: Path, fields: Mapping[str, Any], dtype: torch.dtype, deviation: float = DEVIATION) -> None:
    """Writes `folder` unless it is there and whole; an interrupted one goes on at the first missing shard."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = config_from_mapping({**fields, "dtype": str(dtype).removeprefix("torch.")}, "model.config")
    expected = expected_tensors(config)
    tensors = [
        StoredTensor(name, shape, dtype, str(folder), partial(_values, name, shape, dtype, deviation))
        for name, shape in expected.shapes.items()
    ]
    shards = plan_shards(tensors, SHARD_BYTES)
    _require_space(folder, shards)
    for shard in shards:
        if not (folder / shard.name).is_file():
            write_shard(folder, shard)
    if len(shards) > 1:
        placed = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [expected.class_name]
    beside = folder / "config.json.partial"
    beside.write_text(config.to_json_string())
    beside.replace(folder / "config.json")  # last: a folder with a config is whole


def vocabulary_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, deviation: float) -> torch.Tensor:
    """Normal values, the same for the same name and shape; a vector's are around one where it is a norm's weight."""
    seed = hashlib.sha256(f"{name}{shape}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
    values = torch.empty(math.prod(shape), dtype=dtype).normal_(0.0, deviation, generator=generator)
    if len(shape) == 1 and name.endswith("weight"):
        values += 1
    return values.view(shape)


def _require_space(folder: Path, shards: list[PlannedShard]) -> None:
    needed = sum(shard.nbytes for shard in shards if not (folder / shard.name).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(
            f"The random checkpoint needs {needed / 1e9:.1f} GB in {folder}; {free / 1e9:.1f} GB are free.",
            remedy="Free some space, or name another folder with model.cache_dir=.",
        )
