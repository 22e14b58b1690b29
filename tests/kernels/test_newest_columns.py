"""The newest columns of a cache on disk, put into the ring where they wait and copied from it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.kernels.newest_columns import add_newest, keep_newest

ROWS, HEADS, COLUMNS = 3, 2, 20


@given(
    ring=st.integers(1, 8),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    spans=st.lists(st.tuples(st.integers(0, COLUMNS), st.integers(0, 8)), min_size=ROWS, max_size=ROWS),
)
def test_each_rows_newest_columns_come_from_its_ring_and_nothing_else_changes(
    ring: int, widths: list[int], spans: list[tuple[int, int]]
) -> None:
    newest = [(first, min(first + many, first + ring, COLUMNS)) for first, many in spans]
    parts = [torch.randint(0, 100, (ROWS, HEADS, COLUMNS, width), dtype=torch.uint8) for width in widths]
    rings = [torch.randint(100, 200, (ROWS + 1, HEADS, ring, width), dtype=torch.uint8)[1:] for width in widths]
    expected = [part.clone() for part in parts]
    for made, waiting in zip(expected, rings, strict=True):
        for row, (first, end) in enumerate(newest):
            for column in range(first, end):
                made[row, :, column] = waiting[row, :, column % ring]
    add_newest(parts, rings, np.array(newest, np.int64).reshape(ROWS, 2))
    assert all(torch.equal(part, made) for part, made in zip(parts, expected, strict=True))


def test_columns_of_numbers_wider_than_a_byte_are_copied_whole() -> None:
    part, ring = torch.zeros(1, 2, 6, 4, dtype=torch.bfloat16), torch.randn(1, 2, 4, 4).bfloat16()
    add_newest([part], [ring], np.array([[3, 6]], np.int64))
    assert torch.equal(part[0, :, 3:], ring[0][:, [3, 0, 1]])
    assert not part[0, :, :3].any()


@given(
    ring=st.integers(1, 8),
    columns=st.integers(1, 3),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    firsts=st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=ROWS),
)
def test_new_columns_lie_in_the_rings_of_the_first_rows_and_nothing_else_changes(
    ring: int, columns: int, widths: list[int], firsts: list[int]
) -> None:
    columns = min(columns, ring)
    rings = [torch.randint(0, 100, (ROWS, HEADS, ring, width), dtype=torch.uint8) for width in widths]
    # As attention has them: heads beside each other, column by column.
    new = [torch.randint(100, 200, (len(firsts), columns, HEADS, width), dtype=torch.uint8) for width in widths]
    expected = [each.clone() for each in rings]
    for made, fresh in zip(expected, new, strict=True):
        for row, first in enumerate(firsts):
            for column in range(columns):
                made[row, :, (first + column) % ring] = fresh[row, column]
    keep_newest(rings, [each.transpose(1, 2) for each in new], np.array(firsts, np.int64))
    assert all(torch.equal(each, made) for each, made in zip(rings, expected, strict=True))
