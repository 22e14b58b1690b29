"""Products in tile registers (AMX) or by vectors (AVX512-VNNI): exact sums, and the very numbers of the other ways to
multiply in eight bits."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import dot_products, integer_products, tile_registers
from flexbatch.kernels.tile_products import rows_at_once
from flexbatch.memory.int8_layout import DottedInt8Layout, Int8Layout, TiledInt8Layout, int8_layout, quantize_rows
from flexbatch.memory.int8_linear import int8_linear

pytestmark = pytest.mark.skipif(
    not (tile_registers.are_ours() or dot_products.are_ours()), reason="neither tile registers nor VNNI on this machine"
)
OurLayout = DottedInt8Layout if dot_products.are_ours() else TiledInt8Layout
ROWS = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 576, 577, 600, 1160]))
SIZES = {"rows": ROWS, "width": st.integers(2, 700), "out": st.integers(1, 130), "seed": st.integers(0, 99)}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(st.integers(1, 20_000), st.sampled_from([512, 1024]))
def test_all_rows_are_multiplied_in_parts_of_like_size_and_no_few_are_left_over(rows: int, most: int) -> None:
    at_once = rows_at_once(rows, most)
    parts = [min(at_once, rows - first) for first in range(0, rows, at_once)]
    assert max(parts) <= most * 9 // 8
    assert len(parts) == 1 or min(parts) > max(parts) - tile_registers.SIDE * len(parts)
    assert len(parts) <= -(-rows // most)


@settings(max_examples=80, deadline=None)
@given(**SIZES, largest=st.booleans())
def test_integer_sums_are_exact(rows: int, width: int, out: int, seed: int, largest: bool) -> None:
    generator, low = torch.Generator().manual_seed(seed), 127 if largest else -127
    values = torch.randint(low, 128, (rows, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(low, 128, (out, width), generator=generator, dtype=torch.int8)
    sums = integer_products.integer_sums(values, OurLayout((out, width))._laid(weight), out)
    assert torch.equal(sums, (values.double() @ weight.double().T).int())


@settings(max_examples=60, deadline=None)
@given(**SIZES, type_=st.sampled_from([torch.bfloat16, torch.float32]))
def test_layers_give_the_bits_of_plain_ones(rows: int, width: int, out: int, seed: int, type_: torch.dtype) -> None:
    x, weight, bias = drawn(rows, width, seed=seed), drawn(out, width, seed=seed + 1), drawn(out, seed=seed + 2)
    results = []
    for layout in (Int8Layout((out, width)), OurLayout((out, width))):
        values, scale = layout.pack(weight)
        assert [(each.dtype, tuple(each.shape)) for each in (values, scale)] == [part[1:] for part in layout.parts]
        results.append(int8_linear(x.to(type_), layout.weight(values), scale, bias))
    assert torch.equal(*results)


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_relu_within_a_product_is_relu_after_it(rows: int, width: int, out: int, seed: int) -> None:
    x, weight, bias = drawn(rows, width, seed=seed), drawn(out, width, seed=seed + 1), drawn(out, seed=seed + 2)
    for layout in (Int8Layout((out, width)), OurLayout((out, width))):
        values, scale = layout.pack(weight)
        given_ = (layout.weight(values), scale, bias)
        assert torch.equal(int8_linear(x, *given_, rectified=True), int8_linear(x, *given_).relu())
        x[0, 0] = float("nan")
        assert int8_linear(x, *given_, rectified=True)[0].isnan().all() == int8_linear(x, *given_)[0].isnan().all()
        x[0, 0] = 1


def test_large_layers_on_all_threads_give_them_too() -> None:
    x, weight = drawn(600, 2048, seed=1), drawn(1000, 2048, seed=2)
    plain, ours = Int8Layout(tuple(weight.shape)), OurLayout(tuple(weight.shape))
    wanted = int8_linear(x, plain.weight(plain.pack(weight)[0]), quantize_rows(weight)[1])
    values, scale = ours.pack(weight)
    for _ in range(20):
        assert torch.equal(int8_linear(x, ours.weight(values), scale), wanted)


def test_a_weight_may_lie_anywhere_in_memory() -> None:
    x, weight = drawn(40, 130, seed=1), drawn(70, 130, seed=2)
    layout = OurLayout((70, 130))
    values, scale = layout.pack(weight)
    memory = torch.empty(len(values) + 5, dtype=torch.int8)
    memory[5:] = values
    assert torch.equal(int8_linear(x, memory[5:], scale), int8_linear(x, values, scale))


def test_torch_goes_on_multiplying_after_and_beside_them() -> None:
    x, weight = drawn(64, 512, seed=1), drawn(512, 512, seed=2)
    values, scale = OurLayout((512, 512)).pack(weight)
    wanted, ours = x @ weight, int8_linear(x, values, scale)
    wrong: list[str] = []

    def multiply() -> None:
        for _ in range(50):
            if not torch.equal(int8_linear(x, values, scale), ours):
                wrong.append("integers")
            if not torch.equal(x @ weight, wanted):
                wrong.append("bfloat16")

    threads = [threading.Thread(target=multiply) for _ in range(2)]
    for thread in threads:
        thread.start()
    multiply()
    for thread in threads:
        thread.join()
    assert not wrong


def test_matrices_are_laid_out_for_them_where_they_are_at_hand() -> None:
    assert isinstance(int8_layout((64, 64)), OurLayout)
