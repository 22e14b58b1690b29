"""Pages that only imports needed are given back, and what runs afterwards does not notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flexbatch.memory import library_pages
from flexbatch.memory.library_pages import parse_maps, release_library_pages

MAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/lib/a library.so
00651000-00652000 r--p 00051000 08:02 173521 /usr/lib/a library.so
00652000-00655000 rw-p 00052000 08:02 173521 /usr/lib/a library.so
35b1800000-35b1820000 r--s 00000000 08:02 135522 /data/rows.arrow
7f0000000000-7f0000021000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00021000 r-xp 00000000 00:00 0 [vdso]
"""

# A library that no other process of this machine maps, or its pages would stay: they are counted for all.
PROBE = """
import mmap, os, pathlib, sys
import torch
from flexbatch.memory.library_pages import release_library_pages

with open(pathlib.Path(sys.argv[1]) / "libcopied.so", "w+b") as handle:
    handle.write(bytes(range(256)) * (32 << 12))
    handle.flush()
    os.fsync(handle.fileno())
    mapped = mmap.mmap(handle.fileno(), 32 << 20, prot=mmap.PROT_READ | mmap.PROT_EXEC)
total = sum(mapped[::4096])

def held():
    lines = pathlib.Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith("libcopied.so"))
    return next(int(line.split()[1]) << 10 for line in lines[at:] if line.startswith("Rss:"))

before = held()
release_library_pages()
after = held()
assert sum(mapped[::4096]) == total
x = torch.arange(12.0).view(3, 4)
assert (x @ x.T)[0, 0] == 14
print(before, after)
"""


def file_system(folder: Path) -> str:
    """The type of file system that `folder` is on."""
    partitions = [each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)]
    return max(partitions, key=lambda each: len(each.mountpoint)).fstype


def test_mappings_are_read_as_the_kernel_writes_them() -> None:
    mappings = parse_maps(MAPS)
    assert [each.file for each in mappings] == ["/usr/lib/a library.so"] * 3 + ["/data/rows.arrow", "", ""]
    assert (mappings[0].start, mappings[0].end, mappings[0].mode) == (0x400000, 0x452000, "r-xp")


def test_only_what_of_a_library_cannot_be_written_is_given_back() -> None:
    chosen = list(library_pages._of_libraries(parse_maps(MAPS)))
    assert [(each.start, each.mode) for each in chosen] == [(0x400000, "r-xp"), (0x651000, "r--p")]


def test_pages_of_a_library_leave_memory_and_come_back_when_they_are_needed(tmp_path: Path) -> None:
    if sys.platform != "linux" or file_system(tmp_path) == "tmpfs":
        pytest.skip("pages are given back on Linux alone, and those of tmpfs have nowhere to go")
    probe = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert probe.returncode == 0, probe.stderr
    before, after = map(int, probe.stdout.split())
    assert before >= 32 << 20
    assert after < 1 << 20


def test_without_the_kernels_list_nothing_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_pages, "_MAPS", tmp_path / "maps")
    release_library_pages()
