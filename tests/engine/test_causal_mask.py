"""Masks for keys that do not begin in the first column."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.engine.causal_mask import as_keys_lie


@given(
    columns=st.integers(1, 9),
    before=st.lists(st.integers(-9, 9), min_size=1, max_size=4),
    less=st.integers(0, 8),
    first=st.integers(0, 2),
)
def test_each_key_gets_what_the_mask_says_of_its_column(columns: int, before: list[int], less: int, first: int) -> None:
    mask, count = torch.randn(first + len(before), 1, 1, columns), max(1, columns - less)
    rows = slice(first, first + len(before))
    for _ in range(2):  # made, and as it was made
        lying = as_keys_lie(mask, rows, before, count)
        if not any(before) and count == columns:
            assert torch.equal(lying, mask[rows])
            continue
        for row, start in enumerate(before):
            wanted = [mask[first + row, 0, 0, (start + place) % columns] for place in range(count)]
            assert lying[row, 0, 0].tolist() == [float(number) for number in wanted]


def test_other_rows_and_other_starts_are_not_taken_for_those_before() -> None:
    mask = torch.arange(12.0).view(2, 1, 1, 6)
    assert as_keys_lie(mask, slice(0, 1), [1], 6).flatten().tolist() == [1, 2, 3, 4, 5, 0]
    assert as_keys_lie(mask, slice(1, 2), [1], 6).flatten().tolist() == [7, 8, 9, 10, 11, 6]
    assert as_keys_lie(mask, slice(0, 1), [2], 6).flatten().tolist() == [2, 3, 4, 5, 0, 1]
    assert as_keys_lie(mask, slice(0, 1), [2], 2).flatten().tolist() == [2, 3]
