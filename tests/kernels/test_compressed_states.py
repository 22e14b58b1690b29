"""Keys and values in fewer bytes: what comes back is what was kept, to the bit, or nothing is kept at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.errors import IncompressibleCache
from flexbatch.kernels import compressed_states
from flexbatch.kernels.compressed_states import LISTED_CODE, Compressed, compress, expand
from flexbatch.plan.model_spec import compressed_exceptions, compressed_kv_bytes
from tests.kernels.test_decode_attention import states


def expanded(compressed: Compressed, size: int) -> torch.Tensor:
    out = torch.empty(*compressed[0].shape[:3], size, dtype=torch.bfloat16)
    expand(compressed, out)
    return out


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.contiguous().view(torch.int16).equal(other.contiguous().view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 5),
    tokens=st.integers(1, 9),
    size=st.sampled_from([64, 128, 192, 256]),
    small=st.floats(0, 1),
    least=st.integers(0, 250),
    seed=st.integers(0, 999),
)
def test_any_numbers_come_back_to_the_bit(
    rows: int, heads: int, tokens: int, size: int, small: float, least: int, seed: int
) -> None:
    """Some of them smaller by many powers of two, and some that are no numbers at all."""
    generator = torch.Generator().manual_seed(seed)
    numbers = states(rows, heads, tokens, size, seed=seed)
    lowered = torch.randint(0, least + 1, numbers.shape, generator=generator)
    lowered *= torch.rand(numbers.shape, generator=generator) < small
    numbers = torch.ldexp(numbers.float(), -lowered).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    numbers[0, 0, 0, :5] = special
    if heads * size <= 255:
        assert equal_bits(expanded(compress(numbers, heads * size), size), numbers)
        return
    try:
        made = compress(numbers, 255)
    except IncompressibleCache:
        assert _exceptions(numbers) > 255
        return
    assert equal_bits(expanded(made, size), numbers)


def _exceptions(numbers: torch.Tensor) -> int:
    """The most that a token has."""
    exponents = (numbers.view(torch.int16).int() >> 7) & 0xFF
    less = exponents.amax(3, keepdim=True) - exponents
    return int((less >= LISTED_CODE).sum((1, 3)).max())


def test_a_token_takes_as_many_exceptions_as_there_are_places_and_no_more() -> None:
    numbers = torch.ones(2, 4, 3, 64).bfloat16()
    numbers[1, 1, 2, :5], numbers[1, 3, 2, 60:63] = 2.0**-15, 0.0
    assert _exceptions(numbers) == 8
    assert equal_bits(expanded(compress(numbers, 8), 64), numbers)
    with pytest.raises(IncompressibleCache, match=r"256 numbers 8 are .* and 7 may be") as raised:
        compress(numbers, 7)
    assert "compressed_cache=never" in raised.value.remedy
    numbers[1, 1, 2, :5] = 2.0**-14
    assert compress(numbers, 3)[1][1, 0, 2, 0] == 3


def test_states_may_lie_in_any_order_and_parts_of_the_cache_are_expanded() -> None:
    numbers = states(2, 9, 4, 128).transpose(1, 2)
    made = compress(numbers, 16)
    assert equal_bits(expanded(made, 128), numbers)
    part = tuple(each[1:, :, 3:7] for each in made)
    assert equal_bits(expanded(part, 128), numbers[1:, :, 3:7])


def test_tokens_are_written_into_their_columns_of_the_cache_and_nowhere_else() -> None:
    numbers = states(1, 4, 70, 64)
    made = compress(numbers, 16)
    cache = tuple(torch.full((2, part.shape[1], 90, part.shape[3]), 7, dtype=torch.uint8) for part in made)
    compress(numbers, 16, (cache[0][1:, :, 11:81], cache[1][1:, :, 11:81]))
    assert equal_bits(expanded((cache[0][1:, :, 11:81], cache[1][1:, :, 11:81]), 64), numbers)
    for part in cache:
        part[1, :, 11:81] = 7
        assert part.eq(7).all()


def test_many_tokens_on_all_threads_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = states(2, 8, 70, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compressed_states, "SMALL", 0)
    assert equal_bits(expanded(compress(numbers, 8), 64), numbers)


@given(heads=st.integers(1, 64), size=st.sampled_from([64, 128, 192, 256]))
@settings(max_examples=20, deadline=None)
def test_it_takes_the_bytes_that_the_plan_counts(heads: int, size: int) -> None:
    made = compress(states(1, heads, 2, size), compressed_exceptions(heads * size))
    assert sum(part.nbytes for part in made) == 2 * compressed_kv_bytes(heads, size)


def test_normal_numbers_of_a_large_model_take_less_than_four_fifths() -> None:
    numbers = states(1, 32, 100, 128)
    places = compressed_exceptions(32 * 128)
    assert sum(part.nbytes for part in compress(numbers, places)) < 0.78 * numbers.nbytes
    assert _exceptions(numbers) < places / 4
