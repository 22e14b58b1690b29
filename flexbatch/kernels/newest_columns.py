"""The newest columns of rows of a KV cache, which wait beside it in a ring: put there, and copied to where they
belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.threads import on_all_threads
from flexbatch.kernels.vectors import INT64, function, memory_of


def add_newest(parts: Sequence[torch.Tensor], rings: Sequence[torch.Tensor], newest: Any) -> None:
    """Of each row `newest`, int64 `[rows, 2]`, has the first of some columns of all `parts`, `[rows, heads, columns,
    numbers]`, and the one behind them: they become those of the parts' `rings`, `[rows, heads, columns of the ring,
    numbers]`, where column c is at c modulo the ring's. All on the CPU, with the numbers of a head's columns side by
    side."""
    targets, sources = ([each.view(torch.uint8) for each in some] for some in (parts, rings))
    arguments = (
        tuple(map(flat, targets)),
        tuple(each.stride()[:2] for each in targets),
        tuple(map(flat, sources)),
        tuple(each.stride()[:2] for each in sources),
        tuple(tuple(each.shape[1:]) for each in sources),
        newest,
    )
    on_all_threads(lambda first, step: _copy(*arguments, first, step))


def keep_newest(rings: Sequence[torch.Tensor], new: Sequence[torch.Tensor], firsts: Any) -> None:
    """Puts `new` columns, `[rows, heads, columns, numbers]`, into the first rows' `rings`: of each row those from
    column `firsts`, int64 `[rows]`, on, which may also be what no row has."""
    sources = [(each if each.stride(3) == 1 else each.contiguous()).view(torch.uint8) for each in new]
    targets = [each.view(torch.uint8) for each in rings]
    _keep(
        tuple(map(flat, targets)),
        tuple((*each.stride()[:2], each.shape[2]) for each in targets),
        tuple(map(flat, sources)),
        tuple(each.stride()[:3] for each in sources),
        tuple(tuple(each.shape[1:]) for each in sources),
        firsts,
    )


def _copy_memory(_context: Any, target: Any, to: Any, source: Any, at: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there, here = (
            builder.gep(memory_of(context, builder, signature.args[each], arguments[each]), [arguments[each + 1]])
            for each in (0, 2)
        )
        kinds = [there.type, here.type, INT64, ir.IntType(1)]
        copy = function(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), kinds)
        builder.call(copy, [there, here, arguments[4], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(target, to, source, at, count), generate


_copy_bytes: Any = intrinsic(_copy_memory)
"""Of contiguous arrays of bytes that do not overlap, so many from an index on to another one."""


@njit(nogil=True, cache=True)
def _copy(
    targets: Any,
    target_strides: Any,
    sources: Any,
    source_strides: Any,
    shapes: Any,
    newest: Any,
    first_row: int,
    step: int,
) -> None:
    """Every `step`-th row from `first_row` on."""
    for row in range(first_row, len(newest), step):
        for part in range(len(targets)):
            heads, length, width = shapes[part]
            for head in range(heads):
                to = row * target_strides[part][0] + head * target_strides[part][1]
                at = row * source_strides[part][0] + head * source_strides[part][1]
                column, end = newest[row]
                while column < end:  # once more where the ring begins anew
                    place = column % length
                    many = min(end - column, length - place)
                    _copy_bytes(targets[part], to + column * width, sources[part], at + place * width, many * width)
                    column += many


@njit(nogil=True, cache=True)
def _keep(targets: Any, target_steps: Any, sources: Any, source_strides: Any, shapes: Any, firsts: Any) -> None:
    """`target_steps` are the strides of rows and heads, and the columns of a ring."""
    for row in range(len(firsts)):
        for part in range(len(targets)):
            heads, columns, width = shapes[part]
            row_step, head_step, length = target_steps[part]
            strides = source_strides[part]
            for head in range(heads):
                to, at = row * row_step + head * head_step, row * strides[0] + head * strides[1]
                for column in range(columns):
                    place = (firsts[row] + column) % length
                    _copy_bytes(targets[part], to + place * width, sources[part], at + column * strides[2], width)
