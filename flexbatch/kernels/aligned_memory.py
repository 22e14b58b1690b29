"""Memory of kernels that begins where a line of the processor's caches does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LINE = 64  # bytes
NUMBERS = LINE // 4


@njit(nogil=True)
def aligned(count: int) -> Any:
    """So many float32, of any value. What is read or written across two lines takes twice as long."""
    room = np.empty(count + NUMBERS, np.float32)
    return room[-room.ctypes.data % LINE // 4 :][:count]
