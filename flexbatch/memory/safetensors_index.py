"""Where every tensor of a checkpoint lies: file, offset, type, shape; from the safetensors headers alone.

A checkpoint is `model.safetensors`, or shards named by `model.safetensors.index.json`, or, where there is no index,
every `*.safetensors` file of the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexbatch.errors import ModelError
from flexbatch.memory.safetensors_header import SAFETENSORS_NAMES, TORCH_DTYPES, TensorEntry, read_header

__all__ = ["SAFETENSORS_NAMES", "TORCH_DTYPES", "SafetensorsIndex", "TensorEntry", "read_header"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class SafetensorsIndex:
    """`entries` by tensor name, in file order; `metadata` of the headers (of all shards, the last one wins)."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in order."""
        return tuple(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @staticmethod
    def open(folder: Path) -> SafetensorsIndex:
        """The checkpoint in `folder`; reads headers only. ModelError (file, tensor, remedy) for anything unsound."""
        if not folder.is_dir():
            raise ModelError(
                f"{folder} is not a folder.", remedy="Give the folder that holds config.json and the weights."
            )
        if (folder / SINGLE).exists():
            return SafetensorsIndex.of_file(folder / SINGLE)
        if (folder / INDEX).exists():
            return _sharded(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise _nothing_found(folder)
        _check_complete(folder, files)
        return _merged(files)

    @staticmethod
    def of_file(file: Path) -> SafetensorsIndex:
        """The tensors of one safetensors file."""
        entries, metadata = read_header(file)
        return SafetensorsIndex(entries, metadata)


def _sharded(folder: Path) -> SafetensorsIndex:
    weight_map = _weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).exists():
            lost = [name for name, file in weight_map.items() if file == shard]
            raise ModelError(
                f"{folder / shard} is missing; {INDEX} places {len(lost)} tensors there, such as {lost[0]!r}.",
                remedy="Download the missing shard, or the whole model again.",
            )
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        found, more = read_header(folder / shard)
        metadata.update(more)
        for name, file in weight_map.items():
            if file == shard and name not in found:
                raise ModelError(
                    f"{folder / shard} has no tensor {name!r}, although {INDEX} places it there.",
                    remedy="Index and shards are of different versions: download the model again.",
                )
        entries.update((name, entry) for name, entry in found.items() if weight_map.get(name) == shard)
    return SafetensorsIndex(entries, metadata)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}.", remedy="Check its permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{index} is not a safetensors index: it has no readable `weight_map` ({error}).",
            remedy="Download this file again.",
        ) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index}: `weight_map` does not map names to files.", remedy="Download this file again.")
    if not weight_map:
        raise ModelError(f"{index}: `weight_map` is empty.", remedy="Download this file again.")
    return weight_map


def _check_complete(folder: Path, files: list[Path]) -> None:
    """Shards number themselves (`-00001-of-00003`), so a lost one shows even without an index."""
    present = {file.name for file in files}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if not match:
            continue
        width = len(match["number"])
        for number in range(1, int(match["count"]) + 1):
            expected = f"{match['stem']}-{number:0{width}d}-of-{match['count']}.safetensors"
            if expected not in present:
                raise ModelError(
                    f"{folder / expected} is missing; {file.name} says that there are {int(match['count'])} shards.",
                    remedy="Download the missing shard, or the whole model again.",
                )


def _merged(files: list[Path]) -> SafetensorsIndex:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, more = read_header(file)
        for name in found:
            if name in entries:
                raise ModelError(
                    f"{file} and {entries[name].file} both hold the tensor {name!r}.",
                    remedy=f"Leave one checkpoint in the folder, or add its {INDEX}.",
                )
        entries.update(found)
        metadata.update(more)
    return SafetensorsIndex(entries, metadata)


def _nothing_found(folder: Path) -> ModelError:
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.npy") for file in folder.glob(pattern))
    if others:
        return ModelError(
            f"{folder} holds no safetensors file; it has {others[0]}"
            + (f" and {len(others) - 1} more." if others[1:] else "."),
            remedy="Bring the weights into safetensors once with `python -m flexbatch import`.",
        )
    return ModelError(
        f"{folder} holds no safetensors file.",
        remedy="Give the folder of a complete checkpoint (model.safetensors, or shards with their index).",
    )
