"""How torch's threads wait for work, and how many of its compiled products it keeps."""

from __future__ import annotations

import os
from pathlib import Path

# Rounds of libgomp's waiting loop, about a tenth of a millisecond: longer than from one operation of a layer to the
# next, shorter than what readers and compiled kernels need the core for (docs/benchmarks.md). Its own number is
# thirty times as long. A round is one instruction (PAUSE), which takes some 140 cycles on Intel's processors since
# Skylake, and a quarter to a half of that on others.
SPIN_ROUNDS, SPIN_ROUNDS_OF_INTEL = 10_000, 2_000

# oneDNN compiles a product anew for every number of rows, and keeps the last 1,024 of them: 1.4 MB each on a processor
# with AMX, so a job with prompts of many lengths would come to hold over a gigabyte. A pass needs some ten.
KEPT_PRODUCTS = 48


def prepare_torch() -> None:
    """To be called before torch is imported, which reads it then. What the user has set stays as it is."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(spin_rounds(_processor())))
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's beside it
        os.environ.setdefault(cache, str(KEPT_PRODUCTS))


def spin_rounds(processor: str) -> int:
    """Rounds for a processor that the system describes so (proc(5), cpuinfo)."""
    is_of_intel = "GenuineIntel" in processor
    return SPIN_ROUNDS_OF_INTEL if is_of_intel else SPIN_ROUNDS


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
