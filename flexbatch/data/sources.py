"""From `dataset.path` to the files that are to be read: one file, a folder, a glob, a list, fsspec URLs, saved folders.

Shard names are the files' paths relative to the folder that all of them share, so that a row's identity does not
depend on where the dataset lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flexbatch.config import DatasetConfig
from flexbatch.errors import ConfigError, DataError

FORMATS = ("auto", "arrow", "parquet", "jsonl", "csv", "saved", "hub")
SUFFIXES = {
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".arrows": "arrow",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
HASHED_WHOLE = 64 << 20  # bytes; a longer file is sampled
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One shard. `filesystem` is an fsspec filesystem and `path` the path in it; `size` is in bytes.

    `split` is the split that the whole file belongs to, where its folder says so.
    """

    url: str
    shard: str
    format: str
    size: int
    filesystem: Any
    path: str
    split: str = ""

    @property
    def compressed(self) -> bool:
        return self.path.lower().endswith(COMPRESSIONS)

    def open(self) -> Any:
        """A binary file, decompressed where its name says so."""
        compression = "infer" if self.compressed else None
        return self.filesystem.open(self.path, "rb", compression=compression)

    def content_hash(self) -> str:
        """BLAKE2b of the stored bytes; of 64 blocks spread over the file and its size where it exceeds 64 MiB."""
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        with self.filesystem.open(self.path, "rb") as file:
            if self.size <= HASHED_WHOLE:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                for sample in range(SAMPLES):
                    file.seek(sample * (self.size - SAMPLE_BYTES) // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


class _Found(NamedTuple):
    filesystem: Any
    path: str
    format: str
    split: str = ""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A dataset for the `datasets` library to find: a hub id `owner/name`, `owner/name:configuration`, or a folder."""

    id: str
    configuration: str


def resolve(config: DatasetConfig) -> list[SourceFile] | HubSource:
    """The files that `dataset.path` names, in the order in which they are read (by name; a list keeps its own order).

    Raises:
        ConfigError: dataset.path or dataset.format is not usable.
        DataError: nothing is there, or a folder has no data, or several kinds of data.
    """
    paths = _path_list(config.path)
    if config.format not in FORMATS:
        raise ConfigError(f"dataset.format is '{config.format}'.", remedy=f"Use one of {', '.join(FORMATS)}.")
    if config.format == "hub" or (config.format == "auto" and len(paths) == 1 and _is_hub_id(paths[0])):
        identifier, _, configuration = paths[0].partition(":")
        return HubSource(identifier, configuration)
    found: list[_Found] = []
    for path in paths:
        found += _expand(path, config)
    return _name_shards(found)


def _path_list(path: Any) -> list[str]:
    paths = [path] if isinstance(path, str | os.PathLike) else list(path or [])
    names = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in paths]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"dataset.path is {path!r}: no data is named.",
            remedy="Give a file, a folder, a glob, a list of these, an fsspec URL or a hub id.",
        )
    return [str(Path(name).expanduser()) if name.startswith("~") else name for name in names]


def _is_hub_id(path: str) -> bool:
    """`name` or `owner/name`, nothing of it on this machine, and not the name of a data file that is missing."""
    if not HUB_ID.fullmatch(path) or path.startswith(".") or suffix_of(path) in SUFFIXES:
        return False
    return not Path(path).exists() and not Path(path.partition("/")[0]).exists()


def suffix_of(path: str) -> str:
    """The suffix that tells the format, with a compression suffix taken off first."""
    stem, suffix = posixpath.splitext(path.lower())
    return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def _expand(path: str, config: DatasetConfig) -> list[_Found]:
    """The files that one entry of dataset.path names."""
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isfile(root):
            return [_Found(filesystem, root, _file_format(filesystem, root, config.format))]
        if filesystem.isdir(root):
            return _expand_folder(filesystem, root, path, config)
        if any(character in path for character in "*?["):
            matches = sorted(name for name in filesystem.glob(root) if filesystem.isfile(name))
            if matches:
                return [_Found(filesystem, name, _file_format(filesystem, name, config.format)) for name in matches]
    except ImportError as error:  # fsspec knows the protocol, but needs a package for it
        raise DataError(
            f"dataset.path: '{path}' cannot be opened: {error}.",
            remedy="Install what it names with pip, or copy the data to this machine.",
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset.path: '{path}' cannot be opened: {error}.", remedy="Check the path and its permissions."
        ) from error
    here = f" (looked in {Path.cwd()})" if "://" not in path and not Path(path).is_absolute() else ""
    raise DataError(
        f"dataset.path: '{path}' names nothing that exists{here}.",
        remedy="Give a file, a folder, a glob that matches files, an fsspec URL, or a hub id such as owner/name.",
    )


def _expand_folder(filesystem: Any, root: str, path: str, config: DatasetConfig) -> list[_Found]:
    for marker in ("dataset_dict.json", "state.json"):
        if filesystem.isfile(f"{root}/{marker}"):
            return _expand_saved(filesystem, root, path, config.split)
    if config.format == "saved":
        raise DataError(
            f"dataset.path: '{path}' is not a saved `datasets` folder: it has no state.json and no dataset_dict.json.",
            remedy="Set dataset.format=auto, or save the dataset with save_to_disk.",
        )
    visible = [name for name in sorted(filesystem.find(root)) if not _is_hidden(name, root)]
    formats = {name: SUFFIXES.get(suffix_of(name), "") for name in visible}
    if config.format != "auto":
        chosen = [name for name in visible if formats[name] == config.format] or visible
        found = [_Found(filesystem, name, config.format) for name in chosen]
    else:
        data = {name: kind for name, kind in formats.items() if kind}
        lines = {name: kind for name, kind in data.items() if suffix_of(name) != ".json"}
        found = [_Found(filesystem, name, kind) for name, kind in (lines or data).items()]  # other .json is metadata
    kinds = sorted({file.format for file in found})
    if len(kinds) > 1:
        raise DataError(
            f"dataset.path: folder '{path}' holds files of several formats: {', '.join(kinds)}.",
            remedy=f"Choose with dataset.format={kinds[0]}, or name the files with a glob.",
        )
    if not found:
        raise DataError(
            f"dataset.path: folder '{path}' holds no data files ({len(visible)} other files).",
            remedy=f"Data files end in {', '.join(SUFFIXES)}; for other names give a glob and dataset.format.",
        )
    return found


def _is_hidden(name: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in posixpath.relpath(name, root).split("/"))


def _expand_saved(filesystem: Any, root: str, path: str, split: str) -> list[_Found]:
    """The Arrow streams of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    if filesystem.isfile(f"{root}/dataset_dict.json"):
        splits = [str(name) for name in _read_json(filesystem, f"{root}/dataset_dict.json")["splits"]]
        if (split and split not in splits) or (not split and len(splits) != 1):
            have = f"dataset.split is '{split}'; it" if split else "It"
            raise DataError(
                f"dataset.path: '{path}' is a saved DatasetDict. {have} has the splits {', '.join(splits)}.",
                remedy=f"Set dataset.split={splits[0]}." if splits else "Save a dataset with at least one split.",
            )
        split = split or splits[0]
        root = f"{root}/{split}"
    else:
        split = ""
    state = _read_json(filesystem, f"{root}/state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            f"dataset.path: '{path}' is a saved dataset with a separate list of indices (an old `datasets` version).",
            remedy="Load it and save it again with save_to_disk from a current version of `datasets`.",
        )
    files = [f"{root}/{entry['filename']}" for entry in state.get("_data_files", [])]
    for name in files:
        if not filesystem.isfile(name):
            raise DataError(
                f"dataset.path: '{path}' lacks the file '{posixpath.basename(name)}' that its state.json lists.",
                remedy="Copy the whole folder again.",
            )
    return [_Found(filesystem, name, "arrow", split) for name in files]


def _read_json(filesystem: Any, path: str) -> Any:
    try:
        with filesystem.open(path, "rb") as file:
            return json.loads(file.read())
    except ValueError as error:
        raise DataError(f"dataset.path: '{path}' is not JSON: {error}", remedy="Copy the folder again.") from error


def _file_format(filesystem: Any, path: str, wanted: str) -> str:
    """The format of a file named by itself: as asked for, by its suffix, or by its first bytes."""
    if wanted not in ("auto", "saved"):
        return wanted
    if kind := SUFFIXES.get(suffix_of(path)):
        return kind
    with filesystem.open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.lstrip().startswith(b"{"):
        return "jsonl"
    raise DataError(
        f"dataset.path: the format of '{path}' is not known from its name.",
        remedy="Set dataset.format to arrow, parquet, jsonl or csv.",
    )


def _name_shards(found: Sequence[_Found]) -> list[SourceFile]:
    urls = [_url(file) for file in found]
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise DataError(
            f"dataset.path names '{twice[0]}' twice: its rows would be doubled.", remedy="Name each file once."
        )
    common = _common_folder(urls)
    files = []
    for file, url in zip(found, urls, strict=True):
        size = int(file.filesystem.size(file.path) or 0)
        if size == 0:
            raise DataError(f"dataset.path: '{url}' is empty (0 bytes).", remedy="Remove it, or write it again.")
        files.append(SourceFile(url, url[len(common) :], file.format, size, file.filesystem, file.path, file.split))
    return files


def _url(file: _Found) -> str:
    local = isinstance(file.filesystem, LocalFileSystem)
    return str(file.filesystem.unstrip_protocol(posixpath.normpath(file.path) if local else file.path))


def _common_folder(urls: Sequence[str]) -> str:
    """The longest folder, with its last slash, that all URLs start with."""
    folders = [url.rpartition("/")[0].split("/") for url in urls]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return "/".join(folders[0][:shared]) + "/" if folders and shared else ""
