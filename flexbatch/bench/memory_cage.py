"""A memory limit around one child process, page cache included: a memory cgroup of its own, v1 or v2, or systemd's.

Sources: the kernel's documentation of cgroup v1 (`memory.limit_in_bytes`, `memory.max_usage_in_bytes`) and v2
(`memory.max`, `memory.peak`), and systemd-run(1).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Usage:
    """Bytes: the group's highest count so far, and what is anonymous (not page cache) now. None where not known."""

    peak: int | None
    anonymous: int | None


@dataclass(frozen=True)
class Cage:
    """How to start a command inside the limit. `folder` is the cgroup; `how` says in words what limits memory."""

    how: str
    prefix: tuple[str, ...] = ()
    folder: Path | None = None

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*self.prefix, *arguments]

    def usage(self, pid: int) -> Usage:
        """What the kernel counts for the group of process `pid`."""
        folder = self.folder or (_group_of(pid) if self.prefix else None)
        if folder is None:
            return Usage(None, None)
        peak = _number(folder / "memory.max_usage_in_bytes") or _number(folder / "memory.peak")
        fields = _fields(folder / "memory.stat")
        return Usage(peak or _number(folder / "memory.current"), fields.get("total_rss", fields.get("anon")))

    @property
    def was_killed(self) -> bool:
        """Whether the kernel killed a process of the group because the limit was reached."""
        if self.folder is None:
            return False
        names = ("memory.oom_control", "memory.events")
        return any(_fields(self.folder / name).get("oom_kill", 0) > 0 for name in names)


@contextmanager
def memory_cage(limit: int) -> Iterator[Cage]:
    """A cage of `limit` bytes (0: none). Where no cage can be had, `how` says so, and nothing is limited."""
    if not limit:
        yield Cage("no memory limit was asked for")
        return
    for mount, file, name in (
        (MOUNT / "memory", "memory.limit_in_bytes", "cgroup v1"),
        (MOUNT, "memory.max", "cgroup v2"),
        (MOUNT / "unified", "memory.max", "cgroup v2"),
    ):
        folder = _made(mount, file, limit)
        if folder is not None:
            try:
                # The shell enters the group and then becomes the command, so every page is charged from the first on.
                enter = ("sh", "-c", f'echo $$ > {folder / "cgroup.procs"} && exec "$@"', "sh")
                yield Cage(f"{name}, page cache included", enter, folder)
            finally:
                _remove(folder)
            return
    if _systemd_works(limit):
        yield Cage("systemd-run scope, page cache included", _systemd(limit))
        return
    yield Cage("NOT LIMITED: no memory cgroup can be made here (it needs root, or systemd with user scopes)")


def _made(mount: Path, file: str, limit: int) -> Path | None:
    """A fresh group under `mount` with its limit set, or None where that is not possible."""
    folder = mount / f"flexbatch-bench-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError:
        return None
    try:
        if not (folder / file).exists():
            raise FileNotFoundError(folder / file)
        (folder / file).write_text(str(limit))
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            with contextlib.suppress(OSError):
                (folder / swap).write_text(str(limit) if "memsw" in swap else "0")
    except OSError:
        _remove(folder)
        return None
    return folder


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _systemd(limit: int) -> tuple[str, ...]:
    user = () if os.geteuid() == 0 else ("--user",)
    properties = ("-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0")
    return ("systemd-run", *user, "--scope", "--quiet", "--collect", *properties, "--")


def _systemd_works(limit: int) -> bool:
    if shutil.which("systemd-run") is None:
        return False
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([*_systemd(limit), "true"], capture_output=True, timeout=20, check=False).returncode == 0
    return False


def _group_of(pid: int) -> Path | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                return (MOUNT / "memory" if controllers else MOUNT) / path.strip("/")
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _fields(file: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}
    except (OSError, ValueError):
        return {}
