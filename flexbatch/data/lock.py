"""One process per output folder: an advisory lock (flock) that the system drops with the process, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from flexbatch.data import durable
from flexbatch.errors import LockedError, OutputError

BUSY = (errno.EWOULDBLOCK, errno.EACCES)
TRIES, PAUSE = 10, 0.05  # `status` looks at the lock by holding it for an instant: do not take that for a run


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds, or last held, a folder. `since` is in seconds since the epoch."""

    pid: int = 0
    host: str = ""
    since: float = 0.0


class FolderLock:
    """Held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock and write down who has it.

        Raises:
            LockedError: another process holds it; the message names it.
            OutputError: the folder cannot be written, or its file system has no locks.
        """
        with durable.explained(self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._wait(descriptor)
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode()
            with durable.explained(self._path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder, 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _wait(self, descriptor: int) -> None:
        for attempt in range(TRIES):
            if _try_lock(descriptor, fcntl.LOCK_EX, self._path):
                return
            if attempt < TRIES - 1:
                time.sleep(PAUSE)
        holder, folder = read_holder(self._path), self._path.parent.parent
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
        raise LockedError(
            f"output.dir: '{folder}' is in use by process {holder.pid} on {holder.host}, since {since}.",
            remedy="Wait until it ends, stop it, or choose another output.dir. "
            "`python -m flexbatch status DIR` shows how far it is.",
        )

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)  # and with it the lock
            self._descriptor = -1


def _try_lock(descriptor: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise OutputError(
            f"output.dir: '{path}' cannot be locked: {error.strerror}.",
            remedy="Choose an output.dir on a file system with locks (a local disk, NFS 4).",
        ) from error
    return True


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def read_holder(path: Path) -> Holder:
    """Who wrote the lock file last; an empty `Holder` where nobody has, or it is being written."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads(path.read_text()))
    return Holder()
