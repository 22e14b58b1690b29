"""Our own products: the numbers that the definition gives, row by row, whatever the shapes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import panel_products, row_products, threads
from flexbatch.kernels.panel_products import BLOCK, STEPS
from flexbatch.kernels.register_tiles import LANES, PANEL
from flexbatch.kernels.row_tiles import BFLOATS, BYTES, Numbers
from flexbatch.kernels.vectors import multiplies_floats
from flexbatch.kernels.widened_products import FEW_ROWS, float_product, integer_sums

pytestmark = pytest.mark.skipif(not multiplies_floats(), reason="this processor has no AVX2")

# Around the edges of panels, blocks, groups and steps.
ROWS = st.sampled_from([1, 2, 3, 4, 6, LANES, LANES + 1, PANEL, PANEL + 1, PANEL + LANES + 1, 40])
OUT = st.sampled_from([1, 5, 6, 7, 11, 12, 13, 25, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
IN = st.sampled_from([1, 2, 3, 16, 24, 64, STEPS - 1, STEPS, STEPS + 1, STEPS + 16, 2 * STEPS + 1, 2 * STEPS + 2])
SEED = st.integers(0, 999)


@pytest.fixture(autouse=True, scope="module")
def _on_all_threads() -> Iterator[None]:
    """Small products too, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "WAKING", 0)
        yield


def kinds(count: int, numbers: Numbers = BFLOATS) -> list[ModuleType]:
    """The products that multiply rows of so many numbers."""
    return [panel_products] if count % numbers.step else [panel_products, row_products]


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
    terms = x.double()[:, None] * weight.double()
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    most = 2.0**-8 * exact.abs() + 2.0**-20 * (numbers**0.5) * terms.abs().amax(-1)
    for products in kinds(numbers):
        assert ((products.float_product(x, weight, bias).double() - exact).abs() <= most).all()


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, out=OUT, numbers=IN, seed=SEED)
def test_sums_of_integers_are_exact(rows: int, out: int, numbers: int, seed: int) -> None:
    values, weight = integers(rows, numbers, seed=seed), integers(out, numbers, seed=seed + 1)
    wanted = values.double() @ weight.double().t()
    for products in kinds(numbers, BYTES):
        assert torch.equal(products.integer_sums(values, weight).double(), wanted)


def test_the_largest_integers_do_not_overflow() -> None:
    values, weight = torch.full((3, 8192), 127, dtype=torch.int8), torch.full((7, 8192), -127, dtype=torch.int8)
    for products in kinds(8192):
        assert (products.integer_sums(values, weight) == -127 * 127 * 8192).all()


@settings(max_examples=40, deadline=None)
@given(seed=SEED, numbers=st.sampled_from([1100, 1104]), first=st.integers(0, 39), count=st.integers(1, 20))
def test_a_row_gets_the_same_numbers_whatever_rows_are_beside_it(
    seed: int, numbers: int, first: int, count: int
) -> None:
    x, weight = drawn(40, numbers, seed=seed), drawn(130, numbers, seed=seed + 1)
    alone = x[first : first + count].contiguous()
    for products in kinds(numbers):
        among_others = products.float_product(x, weight, None)[first : first + count]
        assert torch.equal(products.float_product(alone, weight, None), among_others)


@pytest.mark.parametrize("numbers", [1100, 1104])
def test_threads_and_chunks_change_nothing(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(70, numbers, seed=1), drawn(700, numbers, seed=2)
    values, integer_weight = integers(70, numbers, seed=3), integers(700, numbers, seed=4)

    def made() -> list[torch.Tensor]:
        floats = [products.float_product(x, weight, None) for products in kinds(numbers)]
        return floats + [products.integer_sums(values, integer_weight) for products in kinds(numbers, BYTES)]

    together = made()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(panel_products, "PANEL_BYTES", 1)
    assert all(torch.equal(now, before) for now, before in zip(made(), together, strict=True))


def test_numbers_that_are_not_finite_stay_in_their_own_row_and_column() -> None:
    x, weight = drawn(PANEL, 64, seed=5), drawn(30, 64, seed=6)
    x[3, 7] = weight[20, 9] = float("inf")
    for products in kinds(64):
        made = products.float_product(x, weight, None)
        assert not made[3].isfinite().any()
        assert not made[:, 20].isfinite().any()
        rest = made[torch.arange(PANEL) != 3][:, torch.arange(30) != 20]
        assert rest.isfinite().all()


@pytest.mark.parametrize(("rows", "numbers"), [(1, 32), (FEW_ROWS, 32), (FEW_ROWS + 1, 32), (3, 33), (3, 0), (0, 32)])
def test_products_are_right_where_few_rows_become_many_and_where_nothing_is(rows: int, numbers: int) -> None:
    x, weight = drawn(rows, numbers, seed=7), drawn(20, numbers, seed=8)
    wanted = x.double() @ weight.double().t()
    assert torch.allclose(float_product(x, weight, None).double(), wanted, rtol=2**-8, atol=1e-5)
    values, integer_weight = integers(rows, numbers, seed=9), integers(20, numbers, seed=10)
    assert torch.equal(integer_sums(values, integer_weight).double(), values.double() @ integer_weight.double().t())
