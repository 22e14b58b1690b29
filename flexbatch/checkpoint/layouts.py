"""Which published form a checkpoint has, and its tensors under names that Transformers knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.checkpoint.architecture import config_from_mapping
from flexbatch.checkpoint.metaseq import find_files, read_metaseq, to_transformers_names
from flexbatch.checkpoint.numpy_folder import is_numpy_folder, read_numpy_folder
from flexbatch.checkpoint.stored import StoredTensors
from flexbatch.checkpoint.torch_files import bin_files, gguf_error, read_bin_folder
from flexbatch.errors import ConfigError, ModelError

LAYOUTS = ("auto", "bin", "numpy", "metaseq")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `files` are those that hold weights; `pads_vocabulary` says that the embedding may have
    rows that only fill it up to a round number."""

    layout: str
    folder: Path
    files: Sequence[Path]
    tensors: StoredTensors
    pads_vocabulary: bool


def open_source(source: Path, layout: str, config: Mapping[str, Any] | None) -> Source:
    """Open `source` in the given layout (`auto`: found out). Reads names and shapes only. ModelError if unreadable."""
    if layout not in LAYOUTS:
        raise ConfigError(f"--format={layout}: there is no such form.", remedy=f"Choose one of {', '.join(LAYOUTS)}.")
    source = source.expanduser()
    if layout == "auto":
        layout = detect(source)
    if layout == "metaseq":
        return _metaseq(source, config)
    if not source.is_dir():
        raise ModelError(f"{source} is not a folder.", remedy="Give the folder that holds the weights.")
    if layout == "bin":
        return Source(layout, source, bin_files(source), read_bin_folder(source), False)
    tensors = to_transformers_names(read_numpy_folder(source))
    if not tensors:
        raise ModelError(f"{source} holds no numpy files.", remedy="Give the folder with one numpy file per tensor.")
    return Source(layout, source, sorted({Path(tensor.file) for tensor in tensors.values()}), tensors, True)


def detect(source: Path) -> str:
    """bin, numpy or metaseq; ModelError says what `source` is instead."""
    if source.is_dir():
        names = sorted(file.name for file in source.iterdir())
        if any(name.endswith(".safetensors") for name in names):
            raise ModelError(
                f"{source} holds safetensors already.",
                remedy=f"Nothing to import: run it with model=hf model.path={source}.",
            )
        if any(name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")) for name in names):
            return "bin"
        for name in names:
            if name.endswith(".gguf"):
                raise gguf_error(source / name)
        if is_numpy_folder(source):
            return "numpy"
    elif source.suffix == ".gguf":
        raise gguf_error(source)
    if find_files(source) is not None:
        return "metaseq"
    what = "holds no weights in a form that is known" if source.exists() else "does not exist"
    raise ModelError(
        f"{source} {what}.",
        remedy="Known forms: pytorch_model*.bin, a folder of numpy files, metaseq's *.pt files (docs/models.md).",
    )


def _metaseq(source: Path, config: Mapping[str, Any] | None) -> Source:
    files = find_files(source)
    if files is None:
        raise ModelError(
            f"{source}: there are no metaseq *.pt files.", remedy="Give their folder, or one of the files."
        )
    given = config_from_mapping(config, "the given config") if config is not None else None
    tensors = read_metaseq(files, given)
    every = [file for shards in files.parts for file in shards]
    return Source("metaseq", every[0].parent, every, tensors, True)
