"""Our own products: the numbers that the definition gives, row by row, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import panel_products
from flexbatch.kernels.panel_products import BLOCK, STEPS, float_product, integer_sums
from flexbatch.kernels.register_tiles import LANES, PANEL
from flexbatch.kernels.vectors import multiplies_floats

pytestmark = pytest.mark.skipif(not multiplies_floats(), reason="this processor has no AVX2")

# Around the edges of panels, blocks and steps.
ROWS = st.sampled_from([1, 2, LANES, LANES + 1, PANEL, PANEL + 1, PANEL + LANES + 1, 40])
OUT = st.sampled_from([1, 5, 6, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
IN = st.sampled_from([1, 2, 3, 64, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 1, 2 * STEPS + 2])
SEED = st.integers(0, 999)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def integers(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, out=OUT, numbers=IN, seed=SEED, with_bias=st.booleans())
def test_a_product_of_bfloat16_is_summed_in_float32_and_rounded_once(
    rows: int, out: int, numbers: int, seed: int, with_bias: bool
) -> None:
    x, weight = drawn(rows, numbers, seed=seed), drawn(out, numbers, seed=seed + 1)
    bias = drawn(out, seed=seed + 2) if with_bias else None
    terms = x.double()[:, None] * weight.double() if rows * out * numbers < 1 << 22 else None
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    most = 2.0**-8 * exact.abs() + 2.0**-20 * (numbers**0.5) * (1.0 if terms is None else terms.abs().amax(-1))
    assert ((float_product(x, weight, bias).double() - exact).abs() <= most).all()


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, out=OUT, numbers=IN, seed=SEED)
def test_sums_of_integers_are_exact(rows: int, out: int, numbers: int, seed: int) -> None:
    values, weight = integers(rows, numbers, seed=seed), integers(out, numbers, seed=seed + 1)
    wanted = values.double() @ weight.double().t()
    assert torch.equal(integer_sums(values, weight).double(), wanted)


def test_the_largest_integers_do_not_overflow() -> None:
    values, weight = torch.full((3, 8192), 127, dtype=torch.int8), torch.full((7, 8192), -127, dtype=torch.int8)
    assert (integer_sums(values, weight) == -127 * 127 * 8192).all()


@settings(max_examples=20, deadline=None)
@given(seed=SEED, first=st.integers(0, 39), count=st.integers(1, 20))
def test_a_row_gets_the_same_numbers_whatever_rows_are_beside_it(seed: int, first: int, count: int) -> None:
    x, weight = drawn(40, 1100, seed=seed), drawn(130, 1100, seed=seed + 1)
    alone = x[first : first + count].contiguous()
    assert torch.equal(float_product(alone, weight, None), float_product(x, weight, None)[first : first + count])


def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(70, 1100, seed=1), drawn(700, 1100, seed=2)
    values, integer_weight = integers(70, 1100, seed=3), integers(700, 1100, seed=4)
    together, sums = float_product(x, weight, None), integer_sums(values, integer_weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(panel_products, "PANEL_BYTES", 1)
    assert torch.equal(float_product(x, weight, None), together)
    assert torch.equal(integer_sums(values, integer_weight), sums)


def test_numbers_that_are_not_finite_stay_in_their_own_row() -> None:
    x = drawn(PANEL, 64, seed=5)
    x[3, 7] = float("inf")
    made = float_product(x, drawn(30, 64, seed=6), None)
    assert not made[3].isfinite().any()
    assert made[torch.arange(PANEL) != 3].isfinite().all()
