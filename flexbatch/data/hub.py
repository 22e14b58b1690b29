"""Datasets that the `datasets` library finds: a hub id, or a folder with its own loading rules."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexbatch.data.columns import canonical
from flexbatch.data.formats import Record, ShardLayout, batched, infer_columns
from flexbatch.data.sources import HubSource
from flexbatch.errors import DataError

REACH_SECONDS = 5


class HubShard:
    """One split of a hub dataset, streamed (or read from the local cache where HF_HUB_OFFLINE is set)."""

    def __init__(self, source: HubSource, split: str) -> None:
        self._source = source
        if not Path(source.id).exists():
            _check_reachable(source.id)
        self.dataset, self.split = _load(source, split)
        self.name = self.split

    def inspect(self) -> ShardLayout:
        features = self.dataset.features
        if features is None:
            columns = infer_columns(iter(self.dataset))
        else:
            columns = {field.name: canonical(field.type) for field in features.arrow_schema}
        splits = self.dataset.info.splits or {}
        rows = splits[self.split].num_examples if self.split in splits else None
        return ShardLayout(columns, rows or None)

    def read(self) -> Iterator[list[Record]]:
        try:
            yield from batched(iter(self.dataset))
        except Exception as error:  # the library raises errors of many libraries
            raise DataError(
                f"dataset.path: reading '{self._source.id}' failed: {_one_line(error)}",
                remedy="Run the same command again to go on; or download the dataset and give its folder.",
            ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _check_reachable(identifier: str) -> None:
    """The library itself tries for half a minute; one short look first."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if _offline():
        return
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset.path: '{identifier}' is no file or folder here, and as a hub id it cannot be reached: "
            f"{endpoint} does not answer ({_one_line(error)}).",
            remedy="Give a local path instead (dataset.path=FILE-or-FOLDER). "
            "For a copy in the local cache of `datasets`, set HF_HUB_OFFLINE=1.",
        ) from error


def _load(source: HubSource, split: str) -> tuple[Any, str]:
    """(the dataset, the name of its split)."""
    import datasets  # takes a second, and only hub ids need it

    try:
        found = datasets.load_dataset(source.id, source.configuration or None, streaming=not _offline())
    except Exception as error:  # the library raises errors of many libraries
        raise DataError(
            f"dataset.path: `datasets` cannot load '{source.id}': {_one_line(error)}",
            remedy="Check the id (owner/name, or owner/name:configuration), or give a local path.",
        ) from error
    names = [str(name) for name in found]
    if split in names:
        return found[split], split
    if not split and len(names) == 1:
        return found[names[0]], names[0]
    have = f"has no split '{split}'" if split else "has several splits"
    raise DataError(
        f"dataset.split: '{source.id}' {have}; they are {', '.join(names)}.", remedy=f"Set dataset.split={names[0]}."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
