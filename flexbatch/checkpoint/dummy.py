"""Random weights at a model's true shapes: one layer's file shared by all layers.

A 175B shape then streams its true 350 GB through every pass from a few gigabytes of disk: each layer's names map to
the same bytes of the same file. Values are random (compressible or constant bytes would flatter disk and arithmetic),
normal with the standard deviation that models are initialised with; norm weights lie around one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from flexbatch.checkpoint.architecture import Expected, expected_tensors
from flexbatch.errors import CapacityError, ModelError
from flexbatch.memory.safetensors_index import SAFETENSORS_NAMES, SafetensorsIndex, TensorEntry

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 8 * 1024 * 1024
"""Values made at a time: 32 MiB of float32."""

STANDARD_DEVIATION = 0.02

_NORM = re.compile(r"(norm|ln_\w+|layernorm)\w*\.weight$", re.IGNORECASE)

Report = Callable[[str], None]


@dataclass(frozen=True)
class _File:
    """One file of dummy weights: its tensors in order, with the names that they have in layer 0 (or outside)."""

    stem: str
    shapes: Mapping[str, tuple[int, ...]]

    def nbytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) * dtype.itemsize


def dummy_index(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    cache_dir: Path,
    *,
    seed: int = 0,
    report: Report = logger.info,
) -> SafetensorsIndex:
    """An index of every tensor of the model, in files under `cache_dir/dummy` that are made on first use.

    The names are those of the model's `state_dict` (tied tensors once). Creation goes on where an interrupted one
    stopped. CapacityError if the disk has too little room, before anything is written.
    """
    expected = expected_tensors(config)
    files, file_of = _files(expected)
    deviation = float(getattr(config, "initializer_range", None) or STANDARD_DEVIATION)
    folder = cache_dir.expanduser() / "dummy" / _key(config, files, dtype, seed, deviation)
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, files, dtype)
    near_zero_norms = config.model_type.startswith("gemma")  # Gemma multiplies by one plus the stored weight.
    for file in files:
        _make(folder, file, dtype, _Values(seed, deviation, 0.0 if near_zero_norms else 1.0), report)
    headers = {file.stem: SafetensorsIndex.of_file(folder / f"{file.stem}.safetensors") for file in files}
    entries: dict[str, TensorEntry] = {}
    for name in expected.shapes:
        stem, stored = file_of[name]
        entry = headers[stem].entries[stored]
        entries[name] = TensorEntry(name, entry.file, entry.offset, entry.nbytes, entry.dtype, entry.shape)
    return SafetensorsIndex(entries, {"flexbatch": "dummy weights"})


def dummy_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of disk that `dummy_index` needs: one layer of each kind, and what is outside the layers."""
    files, _ = _files(expected_tensors(config))
    return sum(file.nbytes(dtype) for file in files)


def _files(expected: Expected) -> tuple[list[_File], dict[str, tuple[str, str]]]:
    """The files, and for each tensor its file's stem and the name that it is stored by there."""
    layers: dict[int, dict[str, str]] = {}
    outside: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.shapes.items():
        number = expected.layer_of.get(name)
        if number is None:
            outside[name] = shape
        else:
            layers.setdefault(number, {})[_within_layer(name, number)] = name
    kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], str] = {}
    files: list[_File] = []
    file_of = {name: ("outside", name) for name in outside}
    for number in sorted(layers):
        shapes = {short: expected.shapes[name] for short, name in layers[number].items()}
        kind = tuple(shapes.items())
        if kind not in kinds:
            kinds[kind] = f"layer-kind-{len(kinds)}"
            files.append(_File(kinds[kind], shapes))
        file_of.update((name, (kinds[kind], short)) for short, name in layers[number].items())
    files.append(_File("outside", outside))
    return files, file_of


def _within_layer(name: str, number: int) -> str:
    return name.split(f".{number}.", 1)[1]


def _key(config: PreTrainedConfig, files: list[_File], dtype: torch.dtype, seed: int, deviation: float) -> str:
    layout = [[file.stem, [[name, list(shape)] for name, shape in file.shapes.items()]] for file in files]
    digest = hashlib.sha256(json.dumps([layout, str(dtype), seed, deviation]).encode()).hexdigest()
    return f"{config.model_type}-{digest[:16]}"


def _check_space(folder: Path, files: list[_File], dtype: torch.dtype) -> None:
    needed = 0
    for file in files:
        done, partial = folder / f"{file.stem}.safetensors", folder / f"{file.stem}.partial"
        if not done.exists():
            needed += file.nbytes(dtype)
            with contextlib.suppress(FileNotFoundError):  # there is none, or another run has just renamed it
                needed -= partial.stat().st_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(
            f"Dummy weights need {needed / 1e9:.1f} GB in {folder}; {free / 1e9:.1f} GB are free.",
            remedy="Free some space, or name another folder with model.cache_dir=.",
        )


@dataclass(frozen=True)
class _Values:
    """Numbers for tensors, the same for the same seed, name and place."""

    seed: int
    deviation: float
    norm_mean: float

    def chunk(self, name: str, shape: tuple[int, ...], number: int, dtype: torch.dtype) -> torch.Tensor:
        """Values `number * CHUNK_ELEMENTS` and on of the flattened tensor `name`, [at most CHUNK_ELEMENTS]."""
        count = min(CHUNK_ELEMENTS, math.prod(shape) - number * CHUNK_ELEMENTS)
        digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        values = torch.randn(count, generator=generator).mul_(self.deviation)
        if _NORM.search(name):
            values.add_(self.norm_mean)
        return values.to(dtype)

    def chunks(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, skip: int) -> Iterator[torch.Tensor]:
        """All chunks of the tensors in order, but for the first `skip`."""
        place = 0
        for name, shape in shapes.items():
            for number in range(math.ceil(math.prod(shape) / CHUNK_ELEMENTS)):
                if place >= skip:
                    yield self.chunk(name, shape, number, dtype)
                place += 1


def _make(folder: Path, file: _File, dtype: torch.dtype, values: _Values, report: Report) -> None:
    target, partial = folder / f"{file.stem}.safetensors", folder / f"{file.stem}.partial"
    if target.exists():
        return
    header = _header(file.shapes, dtype)
    with partial.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # A second run waits here and then finds the file made.
        if target.exists():
            partial.unlink(missing_ok=True)  # the file was renamed before this one was opened: it is a new, empty one
            return
        done, kept = _whole_chunks(file.shapes, dtype, stream.tell() - len(header))
        stream.truncate(len(header) + kept if done else 0)
        if not done:
            stream.write(header)
        report(f"Making {file.nbytes(dtype) / 1e9:.2f} GB of dummy weights: {target}")
        try:
            for chunk in values.chunks(file.shapes, dtype, done):
                stream.write(chunk.view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            raise ModelError(
                f"{partial} could not be written: {error.strerror or error}.",
                remedy="Free some space, or name another folder with model.cache_dir=; what is written is kept.",
            ) from error
        partial.replace(target)


def _whole_chunks(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, written: int) -> tuple[int, int]:
    """How many whole chunks `written` bytes of data hold, and the bytes of these."""
    done = kept = 0
    for shape in shapes.values():
        left = math.prod(shape)
        while left > 0:
            size = min(CHUNK_ELEMENTS, left) * dtype.itemsize
            if kept + size > written:
                return done, kept
            done, kept, left = done + 1, kept + size, left - CHUNK_ELEMENTS
    return done, kept


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """A safetensors header (https://github.com/huggingface/safetensors#format), padded so that the data is aligned."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt", "flexbatch": "dummy weights"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    return struct.pack("<Q", len(text)) + text
