"""Working folders that the user names: made when needed, and the key named where that is not allowed."""

from __future__ import annotations

import os
from pathlib import Path

from flexbatch.data.durable import FULL, storage_error
from flexbatch.errors import ConfigError


def working_folder(path: str, key: str) -> Path:
    """The folder at `path`, made with its parents, into which files can be written.

    Raises:
        ConfigError: it cannot be made or written to; the message names `key`.
        CapacityError: the disk is full.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise storage_error(error, folder) from error
        raise _unusable(folder, key, error.strerror or str(error)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, key, "Permission denied")
    return folder


def _unusable(folder: Path, key: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{key}: '{folder}' cannot be written: {reason}.",
        remedy=f"Set {key} to a folder that you may write to, on a disk with space.",
    )
