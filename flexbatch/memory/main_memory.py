"""How much main memory this process may use: the machine's, and every cgroup limit above the process.

Sources: proc(5) and the kernel's documentation of cgroup v1 (`memory.limit_in_bytes`) and v2 (`memory.max`). `root`
stands for `/`, so that tests can give other trees.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""Bytes from which a limit means none (cgroup v1 writes the largest multiple of a page)."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One cgroup's `limit` and what it has `used` (bytes; pages of files that can be dropped are not counted)."""

    folder: Path
    limit: int
    used: int


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process could have with nothing else running: the least of all limits."""
    return min([_meminfo(root)["MemTotal"], *(group.limit for group in cgroup_limits(root))])


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may still use: the least of free memory and what every cgroup leaves."""
    free = _meminfo(root)["MemAvailable"]
    return max(0, min([free, *(group.limit - group.used for group in cgroup_limits(root))]))


def cgroup_limits(root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """The memory limits of the process's cgroup and of those above it, innermost first; none if nothing is limited."""
    limits = []
    for mount, path in _memory_groups(root):
        for folder in _upwards(mount, path):
            found = _read_limit(folder)
            if found is not None:
                limits.append(found)
    return tuple(limits)


def peak_resident_bytes() -> int:
    """The most main memory that this process has held at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _meminfo(root: Path) -> dict[str, int]:
    """`MemTotal` and `MemAvailable` in bytes, from /proc/meminfo, or from sysconf where there is no such file."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"MemTotal": total, "MemAvailable": total}
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    fields.setdefault("MemAvailable", fields["MemFree"] if "MemFree" in fields else fields["MemTotal"])
    return fields


def _memory_groups(root: Path) -> Iterator[tuple[Path, str]]:
    """Mount point and path of the process's cgroup, in each hierarchy that may limit memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield base / "memory", path
        elif not controllers:
            yield base, path
            yield base / "unified", path


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. In a container the path may be the host's; the mount is always there."""
    folder = mount / path.strip("/")
    while folder != mount:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    yield mount


def _read_limit(folder: Path) -> MemoryLimit | None:
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None and limit < UNLIMITED]
    if not known:
        return None
    used = _number(folder / "memory.current")
    if used is None:
        used = _number(folder / "memory.usage_in_bytes") or 0
    return MemoryLimit(folder, min(known), max(0, used - _droppable(folder / "memory.stat")))


def _droppable(file: Path) -> int:
    """Bytes of cached file pages that the kernel drops when memory is short. v1 names the subtree's `total_...`."""
    try:
        pairs = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0

    def value(name: str) -> int:
        return int(pairs.get(f"total_{name}", pairs.get(name, 0)))

    return max(0, value("inactive_file") + value("active_file") - max(value("file_mapped"), value("mapped_file")))


def _number(file: Path) -> int | None:
    """A file's number; None for `max`, or where the file is not."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
