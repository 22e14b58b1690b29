"""Which row ids have been seen, at eight bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class SeenIds:
    """A set of 64-bit hashes as a few sorted arrays of growing length (a log-structured merge), 8 bytes an id.

    A hit is almost certainly a double, but may be a coincidence of hashes (1 in 4 million for ten million ids): the
    caller looks at the ids themselves.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, ids: Sequence[str]) -> list[int]:
        """Add a batch; the positions in it whose hash was there before, in the batch or earlier."""
        hashes = np.array([_hash(identifier) for identifier in ids], dtype=np.uint64)
        _, first = np.unique(hashes, return_index=True)
        suspects = np.ones(len(ids), dtype=bool)
        suspects[first] = False
        for run in self._runs:
            at = np.searchsorted(run, hashes)
            suspects |= run[np.minimum(at, len(run) - 1)] == hashes
        self._push(np.sort(hashes))
        return [int(position) for position in np.flatnonzero(suspects)]

    def _push(self, run: npt.NDArray[np.uint64]) -> None:
        if len(run) == 0:
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)


def _hash(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")
