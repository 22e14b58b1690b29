"""bfloat16 numbers come back from their records bit for bit, whatever they are; usual ones take 0.71 of the room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels.exponent_codes import CHUNK, CODES, Expansion, compress, expand, most_exceptions, record_bytes


def room_for(numbers: torch.Tensor, exceptions: int) -> torch.Tensor:
    return torch.zeros(len(numbers), record_bytes(exceptions), dtype=torch.uint8)


def there_and_back(numbers: torch.Tensor, more_room: int = 0) -> torch.Tensor:
    exceptions = most_exceptions(numbers) + more_room
    records, out = room_for(numbers, exceptions), torch.empty_like(numbers)
    compress(numbers, exceptions, records)
    expand([Expansion(records, exceptions, out)])
    return out


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.integers(1, 3),
    seed=st.integers(0, 999),
    more_room=st.integers(0, 70),
    lowest=st.integers(-(2**15), 0),
    highest=st.integers(1, 2**15),
)
def test_any_bits_come_back(chunks: int, seed: int, more_room: int, lowest: int, highest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(lowest, highest, (chunks, CHUNK), generator=generator).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    assert same_bits(there_and_back(numbers, more_room), numbers)


def test_every_one_of_the_65536_numbers_comes_back() -> None:
    numbers = torch.arange(CHUNK, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[None]
    assert most_exceptions(numbers) == CHUNK - CODES * 256
    assert same_bits(there_and_back(numbers), numbers)


def test_more_exceptions_than_there_is_room_for_are_an_error_not_other_numbers() -> None:
    numbers = (torch.randn(2, CHUNK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    most = most_exceptions(numbers)
    with pytest.raises(ValueError, match=f"has {most} exceptions"):
        compress(numbers, most - 1, room_for(numbers, most - 1))


@pytest.mark.parametrize("scale", [1e-30, 0.02, 1.0, 1e30])
def test_normal_numbers_take_seven_tenths(scale: float) -> None:
    numbers = (torch.randn(20, CHUNK, generator=torch.Generator().manual_seed(0)) * scale).bfloat16()
    assert record_bytes(most_exceptions(numbers)) < 0.715 * 2 * CHUNK
    assert same_bits(there_and_back(numbers), numbers)


@pytest.mark.parametrize("value", [0.0, -0.0, torch.inf, torch.nan, 1.0, 1e-40])
def test_equal_numbers_have_no_exceptions(value: float) -> None:
    numbers = torch.full((1, CHUNK), value, dtype=torch.bfloat16)
    assert most_exceptions(numbers) == 0
    assert same_bits(there_and_back(numbers), numbers)
