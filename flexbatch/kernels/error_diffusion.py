"""Error diffusion (as in Bresenham's line): a row of things of different sizes is dealt out in given proportions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True)
def diffuse(sizes: Any, shares: Any) -> Any:
    """For each of `sizes` (int64) the number of the share (float64, adding up to 1) that gets it: the one that lacks
    most so far, on a tie the first. Every running total stays within one size of its share of the total of all."""
    held = np.zeros(len(shares))
    placed = np.empty(len(sizes), np.int8)
    total = 0.0
    for place in range(len(sizes)):
        total += sizes[place]
        best, most = 0, shares[0] * total - held[0]
        for index in range(1, len(shares)):
            lack = shares[index] * total - held[index]
            if lack > most:
                best, most = index, lack
        held[best] += sizes[place]
        placed[place] = best
    return placed
