"""Memory by tier: admitted before it is used, counted, and given back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def parse_bytes(text: str, *, key: str = "") -> int:
    """`3GiB`, `512 MiB`, `1.5GB`, `4096` to bytes. ConfigError names `key`."""
    raise NotImplementedError


def format_bytes(nbytes: float) -> str:
    """Bytes for people: `2.40 GiB`."""
    raise NotImplementedError


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may still use: the least of free memory and every cgroup limit above it."""
    raise NotImplementedError


class TierBudget:
    """The promise of a tier: no more than `limit_bytes` are reserved at a time. `used`, `peak` and `free` in bytes."""

    def __init__(self, tier: str, limit_bytes: int) -> None:
        raise NotImplementedError

    def reserve(self, nbytes: int, what: str) -> None:
        """Admits `nbytes` for `what`, or raises CapacityError: which tier, needed, free, what would fit."""
        raise NotImplementedError

    def release(self, nbytes: int, what: str) -> None:
        raise NotImplementedError


class DiskArena:
    """A preallocated file of `nbytes` for tensors on the disk tier, deleted when closed."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        raise NotImplementedError

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose memory is the file's (shared mapping), zero at first."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class HostArena:
    """Tensors in main memory (pinned for a CUDA device), admitted by a budget."""

    def __init__(self, budget: TierBudget, *, pinned: bool = False) -> None:
        raise NotImplementedError

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
