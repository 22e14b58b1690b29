"""How torch's threads wait for work, and how many of its compiled products it keeps."""

from __future__ import annotations

import os

# Rounds of libgomp's waiting loop, about a tenth of a millisecond: longer than from one operation of a layer to the
# next, shorter than what readers and compiled kernels need the core for (docs/benchmarks.md). Its own number is
# thirty times as long.
SPIN_ROUNDS = 10_000

# oneDNN compiles a product anew for every number of rows, and keeps the last 1,024 of them: 1.4 MB each on a processor
# with AMX, so a job with prompts of many lengths would come to hold over a gigabyte. A pass needs some ten.
KEPT_PRODUCTS = 48


def prepare_torch() -> None:
    """To be called before torch is imported, which reads it then. What the user has set stays as it is."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_ROUNDS))
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's beside it
        os.environ.setdefault(cache, str(KEPT_PRODUCTS))
