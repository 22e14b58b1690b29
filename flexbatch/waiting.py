"""How torch's threads wait for work: for a moment at full speed, then asleep."""

from __future__ import annotations

import os

# Rounds of libgomp's waiting loop, about a tenth of a millisecond: longer than from one operation of a layer to the
# next, shorter than what readers and compiled kernels need the core for (docs/benchmarks.md). Its own number is
# thirty times as long.
SPIN_ROUNDS = 10_000


def wait_shortly() -> None:
    """To be called before torch is imported, which reads it then. What the user has set stays as it is."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_ROUNDS))
