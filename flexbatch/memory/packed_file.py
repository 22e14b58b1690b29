"""Weights of a checkpoint, quantised or laid out anew, in one safetensors file, made once and shared by runs.

`open_packed` finds the file of a checkpoint, checks it, and makes it where it is missing, torn or stale. Tensor `name`
becomes `name.q`, `name.scale` (and `name.minimum`), `name.blocked` or `name.records`; the weight stream reads them like
any others.
Files of a cache folder, all named for the source and the way of packing:

    KEY.safetensors           the packed weights; only ever a whole file
    KEY.json                  manifest: what it was made from, and the checksum of each tensor
    KEY.verified              the file as it was when its checksums were last compared
    KEY.partial, KEY.journal  a file being made, and the tensors in it that are safely on disk
    KEY.lock                  held while making or checking
    exceptions-KEY.json       what was found of a checkpoint that is to be compressed (compressed_weight.py)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.errors import ModelError, OutputError
from flexbatch.memory.packing import Layout, Packer, checksum
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.safetensors_index import SafetensorsIndex

FORMAT_VERSION = 1
PREFIX = "packed-"

OnProgress = Callable[[int, int], None]
"""Called with source bytes packed so far, and all of them."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A packed weight: its layout, and where each of its parts (such as `q`, `scale`, `minimum`) lies."""

    layout: Layout
    parts: Mapping[str, TensorEntry]


def open_packed(
    index: SafetensorsIndex,
    layouts: Mapping[str, Layout],
    cache_folder: Path,
    *,
    on_progress: OnProgress | None = None,
) -> Mapping[str, PackedTensor]:
    """The packed form of the tensors named in `layouts`, by their names.

    Makes the file if needed: tensor by tensor with bounded memory, going on where a killed run stopped; other
    processes that want it wait. A file that is torn (by its checksums) or stale (its source has changed) is rebuilt.
    CapacityError if the disk has no room, ModelError if the checkpoint does not have a tensor in that shape.
    """
    sources = _sources(index, layouts)
    source = identity(sources, layouts)
    stem = cache_folder / packed_key(sources, layouts)
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with _locked(stem.with_suffix(".lock")):
            if not _sound(stem, source):
                _build(stem, source, sources, layouts, on_progress)
    except OSError as error:
        raise OutputError(
            f"The folder {cache_folder} for packed weights cannot be used: {error.strerror or error}.",
            remedy="Set model.cache_dir to a folder with write permission and space.",
        ) from error
    packed = SafetensorsIndex.of_file(stem.with_suffix(".safetensors")).entries
    return {
        name: PackedTensor(layout, {part: packed[f"{name}.{part}"] for part, _, _ in layout.parts})
        for name, layout in layouts.items()
    }


def holds_none(cache_folder: Path) -> bool:
    """Whether no packed file was ever begun there."""
    return not any(cache_folder.glob(f"{PREFIX}*"))


def is_begun(index: SafetensorsIndex, layouts: Mapping[str, Layout], cache_folder: Path) -> bool:
    """Whether the file that `open_packed` would look for has its room already: it is there, or a part of it."""
    stem = cache_folder / packed_key(_sources(index, layouts), layouts)
    return any(stem.with_suffix(suffix).exists() for suffix in (".safetensors", ".partial"))


def _sources(index: SafetensorsIndex, layouts: Mapping[str, Layout]) -> dict[str, TensorEntry]:
    """The entries to pack, in file order, so that the checkpoint is read once from start to end."""
    for name, layout in layouts.items():
        found = index.entries.get(name)
        if found is None or found.shape != layout.shape:
            has = "no such tensor" if found is None else f"it with the shape {list(found.shape)}"
            raise ModelError(
                f"The tensor {name!r} of shape {list(layout.shape)} is to be packed; the checkpoint has {has}.",
                remedy="Config and weights do not belong together: download the model again.",
            )
    return {name: entry for name, entry in index.entries.items() if name in layouts}


def identity(sources: Mapping[str, TensorEntry], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """What the packed file is made from, and how; a change of it makes the file stale."""
    return {
        "format": FORMAT_VERSION,
        "files": file_states(sources.values()),
        "tensors": {
            name: [str(entry.file.resolve()), entry.offset, entry.dtype, repr(layouts[name])]
            for name, entry in sources.items()
        },
    }


def file_states(entries: Iterable[TensorEntry]) -> dict[str, list[int]]:
    """Size and time of change of every file that holds them, by its path."""
    files = {str(file.resolve()): file.stat() for file in {entry.file for entry in entries}}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in sorted(files.items())}


def packed_key(sources: Mapping[str, TensorEntry], layouts: Mapping[str, Layout]) -> str:
    """The file's name without its suffix: the same for a source that has changed, so that a stale file is replaced, not
    left behind."""
    parts = [[name, str(entry.file.resolve()), repr(layouts[name])] for name, entry in sources.items()]
    return PREFIX + hashlib.sha256(json.dumps([FORMAT_VERSION, parts]).encode()).hexdigest()[:24]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds the lock; the kernel drops it with the process, however that ends."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sound(stem: Path, source: Mapping[str, Any]) -> bool:
    """Whether the packed file is there, belongs to this source, and holds the bytes that were written.

    The checksums are compared again only when the file was touched since (size, time or inode changed).
    """
    file, manifest_file = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    try:
        manifest = json.loads(manifest_file.read_text())
        status = file.stat()
        if manifest["source"] != source or manifest["size"] != status.st_size:
            return False
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if _stamp(stem) == stamp:
            return True
        entries = SafetensorsIndex.of_file(file).entries
        if {name: checksum(entry) for name, entry in entries.items()} != manifest["checksums"]:
            return False
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return False
    stem.with_suffix(".verified").write_text(json.dumps(stamp))
    return True


def _stamp(stem: Path) -> Any:
    try:
        return json.loads(stem.with_suffix(".verified").read_text())
    except (OSError, ValueError):
        return None


def _build(
    stem: Path,
    source: Mapping[str, Any],
    sources: Mapping[str, TensorEntry],
    layouts: Mapping[str, Layout],
    on_progress: OnProgress | None,
) -> None:
    """Makes the file aside and puts it in place. An old one's manifest goes first, so that no mixture looks sound."""
    manifest_file = stem.with_suffix(".json")
    manifest_file.unlink(missing_ok=True)
    with Packer(stem, source, sources, layouts) as packer:
        total = sum(entry.nbytes for entry in sources.values())
        done = 0
        for entry in packer.pack():
            done += entry.nbytes
            if on_progress is not None:
                on_progress(done, total)
        checksums = packer.finish(stem.with_suffix(".safetensors"))
    size = stem.with_suffix(".safetensors").stat().st_size
    aside = stem.with_suffix(".json.partial")
    aside.write_text(json.dumps({"source": source, "size": size, "checksums": checksums}))
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    aside.replace(manifest_file)
