"""PyTorch pickles, opened without running anything in them: `torch.load` with `weights_only` and mmap."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from flexbatch.checkpoint.stored import StoredTensor, from_tensor
from flexbatch.errors import ModelError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")

# A metaseq file keeps its training options beside the weights. They are of no use here: instances of these modules'
# classes are read as `Inert`, so nothing of theirs is imported or run. Anything else that is not a tensor is refused.
_INERT_MODULES = ("argparse", "omegaconf", "metaseq", "fairseq", "fairscale", "typing", "enum", "numpy", "collections")
_INERT_BUILTINS = ("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.bool")


class Inert:
    """Stands in for any object that is not weights; keeps nothing and does nothing."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def load_pickle(file: Path, *, options_inside: bool = False) -> Any:
    """The object in `file`, its tensors memory-mapped. With `options_inside`, training options in it become `Inert`.

    ModelError: the pickle holds code, the file is truncated or no PyTorch file.
    """
    check_header(file)
    inert = _inert_globals(file) if options_inside else []
    with torch.serialization.safe_globals([(Inert, name) for name in inert]):
        try:
            return torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            raise _refused(file, str(error)) from error
        except (RuntimeError, EOFError, ValueError, OSError, KeyError, AssertionError) as error:
            raise unreadable(file, error) from error


def read_bin_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face `.bin` checkpoint: one file, shards with an index, or shards alone."""
    tensors: dict[str, StoredTensor] = {}
    legacy = _LegacyFiles()
    for file in bin_files(folder):
        mapped = zipfile.is_zipfile(file)
        state = load_pickle(file) if mapped else legacy.load(file)
        if not isinstance(state, dict):
            raise ModelError(
                f"{file} holds a {type(state).__name__}, not a mapping of names to tensors.",
                remedy="This is no Transformers checkpoint; see `python -m flexbatch import --help` for the forms.",
            )
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if name in tensors:
                raise ModelError(
                    f"{file} and {tensors[name].file} both hold the tensor {name!r}.",
                    remedy="Leave the shards of one checkpoint in the folder.",
                )
            tensors[str(name)] = (
                from_tensor(str(name), value.detach(), str(file)) if mapped else legacy.stored(name, value, file)
            )
    return tensors


class _LegacyFiles:
    """Files that cannot be mapped: loaded whole, and again when their tensors are read, so that no more than one stays
    in memory."""

    def __init__(self) -> None:
        self._file, self._state = Path(), None

    def load(self, file: Path) -> Any:
        if file != self._file:
            self._file, self._state = file, load_pickle(file)
        return self._state

    def stored(self, name: str, value: torch.Tensor, file: Path) -> StoredTensor:
        shape, dtype = tuple(value.shape), value.dtype

        def read() -> torch.Tensor:
            found: torch.Tensor = self.load(file)[name].detach()
            return found

        return StoredTensor(name, shape, dtype, str(file), read)


def bin_files(folder: Path) -> list[Path]:
    """The checkpoint's files in order; ModelError names a shard that is missing."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder / INDEX).values()))
    else:
        found = [(file.name, match) for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))]
        names = sorted(name for name, _ in found)
        if found:
            width, count = len(found[0][1][1]), found[0][1][2]
            names = [f"pytorch_model-{number:0{width}d}-of-{count}.bin" for number in range(1, int(count) + 1)]
    if not names:
        raise ModelError(f"{folder} holds no pytorch_model*.bin.", remedy="Give the folder with the weights.")
    for name in names:
        if not (folder / name).exists():
            raise ModelError(
                f"{folder / name} is missing.", remedy="Fetch the missing shard, or the whole model again."
            )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} has no readable weight_map ({error}).", remedy="Fetch this file again.") from error
    return dict(weight_map)


def check_header(file: Path) -> None:
    """ModelError for what is no PyTorch file at all: missing, empty, a git-LFS pointer, GGUF."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.", remedy="Check the path.") from error
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{file} is a git-LFS pointer, not the weights.", remedy="Fetch the weights with `git lfs pull`."
        )
    if start.startswith(b"GGUF"):
        raise gguf_error(file)
    if not start:
        raise ModelError(f"{file} is empty.", remedy="Fetch this file again.")


def gguf_error(file: Path) -> ModelError:
    return ModelError(
        f"{file} is a GGUF file. GGUF is out of flexbatch's scope: its weights are quantised for llama.cpp.",
        remedy="Take the same model in safetensors or .bin form, and choose offload.weight_bits=4 for 4-bit weights.",
    )


def _inert_globals(file: Path) -> list[str]:
    """The classes that `file` names beside tensors, if all of them are known training options."""
    if not zipfile.is_zipfile(file):
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise unreadable(file, error) from error
    for name in names:
        if name.split(".")[0] not in _INERT_MODULES and name not in _INERT_BUILTINS:
            raise _refused(file, f"GLOBAL {name}")
    return names


def _refused(file: Path, text: str) -> ModelError:
    match = re.search(r"GLOBAL ([\w.]+)", text)
    what = match.group(1) if match else "something that is not a tensor"
    return ModelError(
        f"{file} is refused: its pickle asks for {what}, which could run code when it is loaded.",
        remedy="Take the model from a source that you trust in safetensors form; weights alone never need this.",
    )


def unreadable(file: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return ModelError(
        f"{file} is truncated or not a PyTorch checkpoint ({reason}).", remedy="Fetch or copy this file again."
    )
