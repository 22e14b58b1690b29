"""Weights in oneDNN's blocked format multiply to the very bits of plain ones, wherever their bytes come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flexbatch.memory.blocked_weight import (
    ZERO_POINT,
    blocked_bytes,
    blocked_form,
    blocked_layout,
    integer_product,
    lay_out,
    linear,
    suits,
)
from flexbatch.memory.int8_layout import BlockedInt8Layout, Int8Layout
from flexbatch.memory.int8_linear import int8_linear

bfloat16 = pytest.mark.skipif(not suits(torch.bfloat16), reason="no blocked bfloat16 weights on this machine")
int8 = pytest.mark.skipif(not suits(torch.int8), reason="no blocked int8 weights on this machine")
ROWS, WIDTH, OUT, SEED = st.integers(1, 70), st.integers(2, 200), st.integers(1, 200), st.integers(0, 99)
SIZES = {"rows": ROWS, "width": WIDTH, "out": OUT, "seed": SEED}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """To the bit; before torch 2.12 oneDNN adds up laid-out weights in another order on some processors (AMX), and one
    number in ten thousand is rounded the other way."""
    if torch.__version__ >= "2.12":
        assert torch.equal(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-6)


@bfloat16
@settings(max_examples=60, deadline=None)
@given(**SIZES, biased=st.booleans())
def test_laid_out_weights_give_the_bits_of_plain_ones(rows: int, width: int, out: int, seed: int, biased: bool) -> None:
    x, weight = drawn(rows, width, seed=seed), drawn(out, width, seed=seed + 1)
    bias = drawn(out, seed=seed + 2) if biased else None
    wanted = functional.linear(x, weight, bias)
    assert_same(linear(x, weight, bias), wanted)
    assert_same(linear(x[None], lay_out(weight), bias)[0], wanted)


@bfloat16
@settings(max_examples=30, deadline=None)
@given(**SIZES, shift=st.sampled_from([0, 4, 64]))
def test_a_stored_weight_gives_them_too(rows: int, width: int, out: int, seed: int, shift: int) -> None:
    x, weight = drawn(rows, width, seed=seed), drawn(out, width, seed=seed + 1)
    layout = blocked_layout((out, width))
    ((name, dtype, shape),), (stored,) = layout.parts, layout.pack(weight.float())
    assert (name, dtype, shape) == ("blocked", stored.dtype, tuple(stored.shape))
    memory = torch.empty(len(stored) + shift, dtype=torch.uint8)  # in a stream it may lie anywhere
    memory[shift:] = stored
    assert_same(linear(x, layout.weight(memory[shift:]), None), functional.linear(x, weight))


@int8
@settings(max_examples=60, deadline=None)
@given(**SIZES, largest=st.booleans())
def test_integer_sums_are_exact(rows: int, width: int, out: int, seed: int, largest: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = 127 if largest else -127
    values = torch.randint(low, 128, (rows, width), generator=generator)
    weight = torch.randint(low, 128, (out, width), generator=generator)
    wanted = (values @ weight.T).float()
    assert torch.equal(integer_product((values + ZERO_POINT).to(torch.uint8), lay_out(weight.to(torch.int8))), wanted)


@int8
@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_8_bit_layers_are_the_same_in_either_layout(rows: int, width: int, out: int, seed: int) -> None:
    x, weight, bias = drawn(rows, width, seed=seed), drawn(out, width, seed=seed + 1), drawn(out, seed=seed + 2)
    plain, blocked = Int8Layout((out, width)), _blocked_int8((out, width))
    results = []
    for layout in (plain, blocked):
        values, scale = layout.pack(weight)
        assert [(each.dtype, tuple(each.shape)) for each in (values, scale)] == [part[1:] for part in layout.parts]
        results.append(int8_linear(x, layout.weight(values), scale, bias))
    assert torch.equal(*results)


@int8
def test_many_rows_are_multiplied_in_pieces_without_a_difference() -> None:
    x, weight = drawn(1100, 64, seed=1), drawn(5000, 64, seed=2)  # more sums than are made at a time
    values, scale = _blocked_int8((5000, 64)).pack(weight)
    laid_out = _blocked_int8((5000, 64)).weight(values)
    alone = torch.cat([int8_linear(part, laid_out, scale) for part in x.split(100)])
    assert torch.equal(int8_linear(x, laid_out, scale), alone)


@bfloat16
def test_views_of_a_weight_leave_no_memory_behind() -> None:
    form, weight = blocked_form((64, 64), torch.bfloat16), lay_out(drawn(64, 64, seed=1))
    memory = blocked_bytes(weight)
    for _ in range(100):
        form.over(memory)
    before = _resident_bytes()
    for _ in range(20_000):
        form.over(memory)
    for _ in range(2_000):
        blocked_bytes(weight)
    assert _resident_bytes() - before < 8 << 20  # a forgotten tensor takes 1.6 kB


def _blocked_int8(shape: tuple[int, int]) -> BlockedInt8Layout:
    return BlockedInt8Layout(shape, blocked_form(shape, torch.int8).key)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
