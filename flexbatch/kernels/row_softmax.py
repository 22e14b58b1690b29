"""The softmax of one query's scores, for kernels that Numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexbatch.kernels.floats import LEAST, LOG2_OF_E, LOWEST
from flexbatch.kernels.vectors import WIDTH, add, fill, larger, load, multiply, store, subtract, total, two_to


@njit(nogil=True, inline="always")
def room(columns: int) -> Any:
    """Memory for so many scores and some more, in whole vectors."""
    return np.empty(columns // WIDTH * WIDTH + 2 * WIDTH, np.float32)


@njit(nogil=True)
def weigh(scores: Any, start: int, columns: int, highest: Any) -> Any:
    """Makes the scores from `start` to `columns`, the largest of which is `highest`, their exponentials over its own,
    and gives their sum, float32. `scores` is such a `room`; what lies beyond `columns` there becomes next to nothing,
    and what lies before `start` is lost."""
    first = start // WIDTH * WIDTH
    scores[first:start] = LOWEST
    scores[columns:] = LOWEST
    least, factor, base, sums = fill(LEAST), fill(LOG2_OF_E), fill(highest), fill(np.float32(0))
    for column in range(first, len(scores), WIDTH):
        # In this order NaN stays what it is.
        power = two_to(multiply(larger(least, subtract(load(scores, column), base)), factor))
        store(scores, column, power)
        sums = add(sums, power)
    # Of what is no score e**-87 each went in, 1e-38, to a sum of at least 1.
    return total(sums)
