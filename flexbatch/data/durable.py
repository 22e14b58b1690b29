"""Files that survive: written beside, synced, renamed into place; and what a full disk or a refusal says.

A rename within one file system is atomic (POSIX), so a reader sees the old file or the whole new one. The file is
synced before the rename and the folder after it, so this holds over a power failure too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flexbatch.errors import CapacityError, FlexbatchError, OutputError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # no space, over quota, over the limit on a file's size


def storage_error(error: OSError, path: Path) -> FlexbatchError:
    """The error of the tree for an error of the file system."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return CapacityError(
            f"the disk is full: '{path}' cannot be written ({reason}).",
            remedy="Everything finished before is kept. Make space and run the same command again to go on.",
        )
    return OutputError(
        f"output.dir: '{path}' cannot be written: {reason}.",
        remedy="Check that the folder exists, is yours and is not read-only; or choose another output.dir.",
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError on `path` into CapacityError or OutputError."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def make_folder(folder: Path) -> None:
    """Make a folder with its parents. Raises CapacityError, OutputError."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_file(target: Path, content: bytes, scratch: Path) -> None:
    """Put `content` at `target`, whole or not at all, and durably; `scratch` is a folder on the same file system.

    Raises:
        CapacityError: the disk is full. Nothing is left behind.
        OutputError: no permission, a read-only file system, or the like.
    """
    _put(target, content, scratch, finish=os.fsync)
    with explained(target):
        sync_folder(target.parent)


def replace_file(target: Path, content: bytes, scratch: Path) -> None:
    """As `write_file`, but a power failure may leave the old file: for what is written often and only informs."""
    _put(target, content, scratch, finish=lambda _: None)


def _put(target: Path, content: bytes, scratch: Path, *, finish: Callable[[int], None]) -> None:
    make_folder(scratch)
    make_folder(target.parent)
    temporary = scratch / f"{target.name}.{os.getpid()}"
    with explained(target):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                write_all(descriptor, content)
                finish(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes; the system may take them in pieces."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Delete what an earlier attempt left in a scratch folder. Raises OutputError."""
    with explained(folder):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
