"""Memory by tier: admitted before it is used, counted, and given back."""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flexbatch.errors import CapacityError, ConfigError, OutputError
from flexbatch.memory.direct_io import page_ceil
from flexbatch.memory.main_memory import available_memory, memory_limit

__all__ = [
    "DiskArena",
    "HostArena",
    "TierBudget",
    "available_memory",
    "format_bytes",
    "memory_limit",
    "parse_bytes",
]

_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[kmgtp]?)(?P<kind>i?b?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_bytes(text: str | int, *, key: str = "size") -> int:
    """`3GiB`, `512 MiB`, `1.5GB` (powers of 1000), `2G` (as GiB), `4096` to bytes. ConfigError names `key`."""
    match = _SIZE.fullmatch(str(text))
    if not match:
        raise ConfigError(f"{key} is {text!r}, which is not a size.", remedy="Write it like 3GiB, 512MiB or 1.5GB.")
    base = 1000 if match["kind"].lower() == "b" and match["unit"] else 1024
    return int(float(match["number"]) * base ** _POWERS[match["unit"].lower()])


def format_bytes(nbytes: float) -> str:
    """Bytes for people: `2.40 GiB`, `512 bytes`."""
    size, units = float(nbytes), ["KiB", "MiB", "GiB", "TiB", "PiB"]
    if abs(size) < 1024:
        return f"{size:.0f} bytes"
    for unit in units:
        size /= 1024
        if abs(size) < 1024 or unit == units[-1]:
            break
    return f"{size:.2f} {unit}"


class TierBudget:
    """The promise of a tier: no more than `limit_bytes` are reserved at a time. Thread-safe.

    `used`, `peak` and `free` are bytes; `by_purpose` says who holds what.
    """

    def __init__(self, tier: str, limit_bytes: int) -> None:
        self.tier = tier
        self.limit_bytes = limit_bytes
        self.peak = 0
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self._held.total()

    @property
    def free(self) -> int:
        return self.limit_bytes - self.used

    @property
    def by_purpose(self) -> Mapping[str, int]:
        return {what: nbytes for what, nbytes in self._held.items() if nbytes}

    def reserve(self, nbytes: int, what: str) -> None:
        """Admits `nbytes` for `what`, or raises CapacityError: which tier, needed, free, what would fit."""
        with self._lock:
            if nbytes > self.free:
                raise CapacityError(
                    f"The {self.tier} tier has no room for {what}: it needs {format_bytes(nbytes)}, and "
                    f"{format_bytes(self.free)} of its {format_bytes(self.limit_bytes)} are free.",
                    remedy=f"Up to {format_bytes(max(0, self.free))} would fit; or raise the limit by "
                    f"{format_bytes(nbytes - self.free)}: {_limit_key(self.tier)}.",
                )
            self._held[what] += nbytes
            self.peak = max(self.peak, self.used)

    def release(self, nbytes: int, what: str) -> None:
        """Gives back what was reserved for `what`."""
        with self._lock:
            if nbytes > self._held[what]:
                raise ValueError(f"{what} gives back {nbytes} bytes on {self.tier}, but holds {self._held[what]}")
            self._held[what] -= nbytes


class DiskArena:
    """A preallocated file of `nbytes` for tensors on the disk tier.

    The file has no name from the start, so nothing is left of it however the process ends. CapacityError if the disk
    has no room (before anything runs); OutputError if the folder cannot be written.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.nbytes = page_ceil(max(nbytes, 1))
        self.used = 0
        self._descriptor = nameless_file(folder, self.nbytes)
        try:
            self._map = mmap.mmap(self._descriptor, self.nbytes, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._whole = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of whole pages whose memory is the file's (a shared mapping), zero at first."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self.used + nbytes > self.nbytes:
            raise CapacityError(
                f"The disk arena has no room for a tensor of {format_bytes(nbytes)}: "
                f"{format_bytes(self.nbytes - self.used)} of {format_bytes(self.nbytes)} are free.",
                remedy="Raise the share of KV cache or hidden states in memory, or lower offload.slots.",
            )
        flat = self._whole[self.used : self.used + nbytes]
        self.used += page_ceil(nbytes)
        return flat.view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Gives the disk space back once the last tensor is gone. Safe to repeat."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            # Unmapping now would pull the memory from under tensors that are still held: each keeps the mapping alive.
            del self._whole, self._map


class HostArena:
    """Tensors in main memory (pinned for a CUDA device), admitted by a budget first."""

    def __init__(self, budget: TierBudget, *, pinned: bool = False) -> None:
        self._budget = budget
        self._pinned = pinned
        self._reserved: list[tuple[int, str]] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
        """An uninitialised tensor; its bytes are reserved for `what` until `close`."""
        nbytes = math.prod(shape) * dtype.itemsize
        self._budget.reserve(nbytes, what)
        self._reserved.append((nbytes, what))
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._pinned)

    def close(self) -> None:
        """Gives every reservation back; the caller drops the tensors. Safe to repeat."""
        while self._reserved:
            self._budget.release(*self._reserved.pop())


def nameless_file(folder: Path, nbytes: int) -> int:
    """The descriptor of a preallocated file of which nothing is left however the process ends. CapacityError if the
    disk has no room, OutputError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="flexbatch-arena-", dir=folder)
    except OSError as error:
        raise OutputError(
            f"The folder {folder} for tensors on disk cannot be written: {error.strerror}.",
            remedy="Set offload.disk_dir to a folder with write permission.",
        ) from error
    Path(name).unlink()
    try:
        allocate(descriptor, nbytes, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def allocate(descriptor: int, nbytes: int, folder: Path) -> None:
    """Gives a file its space on disk beforehand; CapacityError if `folder` has no room for it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.truncate(descriptor, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{folder} cannot hold tensors: {error.strerror}.", remedy="Use a folder on another disk."
            ) from error
        free = shutil.disk_usage(folder).free
        raise CapacityError(
            f"The disk needs {format_bytes(nbytes)} in {folder}, where {format_bytes(free)} are free "
            f"({error.strerror}).",
            remedy="Free space, or use another disk: offload.disk_dir for KV cache, model.cache_dir for weights.",
        ) from error


def _limit_key(tier: str) -> str:
    return {"device": "offload.device_memory", "host": "offload.host_memory"}.get(tier, "offload.disk_dir")
