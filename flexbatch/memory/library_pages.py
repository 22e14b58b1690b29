"""Pages of shared libraries that only the start needed: given back, they make room for rows and weights.

torch, Arrow and the kernels' compiler map 250 MB of code and tables, of which a run touches some 50. What was touched
while modules were imported counts against the process's limit like any other page, until the kernel is told.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# madvise(2), since Linux 5.4: clean pages of files leave memory, and are read again where they are touched again.
_PAGE_OUT = 21
_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One range of addresses (proc(5), maps): `mode` as in r-xp; `file` is empty for memory of no file."""

    start: int
    end: int
    mode: str
    file: str


def release_library_pages() -> None:
    """Gives back what this process holds of libraries' files and has not written to.

    Pages that other processes map too stay, and so do those of files that another user owns. Nothing is lost: a page
    that is needed again is read again. Elsewhere than on Linux nothing is done.
    """
    if not _MAPS.exists():
        return
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for each in _of_libraries(parse_maps(_MAPS.read_text())):
            advise(ctypes.c_void_p(each.start), ctypes.c_size_t(each.end - each.start), _PAGE_OUT)


def parse_maps(text: str) -> list[Mapping]:
    """The mappings that a file in the format of proc(5)'s maps lists."""
    return [_parsed(line) for line in text.splitlines()]


def _parsed(line: str) -> Mapping:
    addresses, mode, _, _, _, *file = line.split(maxsplit=5)
    start, end = (int(address, 16) for address in addresses.split("-"))
    return Mapping(start, end, mode, file[0] if file and file[0].startswith("/") else "")


def _of_libraries(mappings: list[Mapping]) -> Iterator[Mapping]:
    """Ranges of files with code in them that cannot be written to. A mapped checkpoint or dataset is no library."""
    libraries = {each.file for each in mappings if each.file and "x" in each.mode}
    return (each for each in mappings if each.file in libraries and "w" not in each.mode)
