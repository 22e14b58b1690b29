"""Nothing that an earlier process read may still lie in memory: those pages would be charged to nobody."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")


def drop_page_cache(files: Iterable[Path]) -> str:
    """Drops the whole page cache, or where that is not allowed the pages of `files`. Says in words what was done."""
    os.sync()
    try:
        DROP.write_text("1\n")
    except OSError:
        return _drop_files(files)
    return "page cache dropped before each run"


def _drop_files(files: Iterable[Path]) -> str:
    if not hasattr(os, "posix_fadvise"):
        return "page cache NOT dropped: this system offers no way"
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return "only the model's pages dropped from the page cache before each run (drop_caches needs root)"
