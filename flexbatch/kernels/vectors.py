"""Vectors of sixteen float32 in the registers of a processor, for kernels that Numba compiles.

Numba's loops become vectors by themselves where they are simple. Where a kernel is to keep sums in registers, or needs
an instruction that multiplies pairs of bfloat16 (AVX512-BF16), it calls these: each is one instruction or a few, and
twice as many with AVX2.

Two bfloat16 that are multiplied together lie in one uint32, the first in its lower half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

WIDTH = 16
INT32, INT64 = ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
PAIRS = ir.VectorType(INT32, WIDTH)
HALVES = ir.VectorType(ir.IntType(16), 2 * WIDTH)
LEAST_POWER = -126.0  # 2**x of less is no normal float32
# 2**x on [-0.5, 0.5], fitted at Chebyshev nodes: relative error below 3e-7.
POWERS = (1.3400433e-3, 9.676037e-3, 5.5503272e-2, 0.24022107, 0.6931472, 1.0000001)


@cache
def multiplies_pairs() -> bool:
    """Whether this processor has the instructions."""
    return has_features("avx512f", "avx512bw", "avx512bf16")


@cache
def multiplies_tiles() -> bool:
    """Whether this processor multiplies tiles of sixteen rows of bfloat16 (AMX)."""
    return has_features("amx-bf16")


@cache
def multiplies_floats() -> bool:
    """Whether this processor has AVX2 and adds products without rounding them first."""
    return has_features("avx2", "fma")


@cache
def multiplies_integers() -> bool:
    """Whether this processor multiplies 8-bit integers four at a time (VNNI)."""
    return has_features("avx512vnni") or has_features("avxvnni")


def has_features(*names: str) -> bool:
    """Whether this processor has what LLVM calls so."""
    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in names)


class _Vector(types.Type):
    """The type that Numba knows for what is a vector in LLVM."""


floats, pairs = _Vector("float32 x 16"), _Vector("uint32 x 16")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, FLOATS if of is floats else PAIRS)  # type: ignore[no-untyped-call]


def function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function of LLVM's, declared once a module."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def number(builder: Any, memory: Any, at: Any, kind: Any, align: int = 4) -> Any:
    """What lies at index `at` of the numbers that `memory` points to, read as `kind`."""
    return builder.load(_place(builder, memory, at, kind), align=align)


def put(builder: Any, memory: Any, at: Any, value: Any, align: int = 4) -> None:
    """Writes a vector over the numbers from index `at` on."""
    builder.store(value, _place(builder, memory, at, value.type), align=align)


def fetch(builder: Any, place: Any, *, nearness: int) -> None:
    """Asks for the line of bytes at `place`, to be read: for every cache (3), or from the second on (2)."""
    ask = function(builder, "llvm.prefetch.p0", ir.VoidType(), [place.type, INT32, INT32, INT32])
    builder.call(ask, [place, INT32(0), INT32(nearness), INT32(1)])


def memory_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The pointer to the first number of an array of this Numba type."""
    return context.make_array(kind)(context, builder, array).data


def repeated(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, value, INT32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(INT32, kind.count), [0] * kind.count))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of vectors of float32, rounded once."""
    fused = function(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(fused, [a, b, c])


def accumulated(
    builder: Any,
    steps: Any,
    starts: Sequence[Any],
    add: Callable[[Any, list[Any]], list[Any]],
    *,
    together: int = 1,
) -> list[Any]:
    """Vectors that begin as `starts`, after `steps` steps: `add(step, vectors)` gives the next ones. They stay in
    registers as far as there are. `together` steps are one turn of the loop, the rest follow one by one."""
    step, sums = INT64(0), list(starts)
    for many in (together, 1) if together > 1 else (1,):
        step, sums = _loop(builder, step, steps, sums, add, many)
    return sums


def _loop(
    builder: Any, first: Any, end: Any, starts: list[Any], add: Callable[[Any, list[Any]], list[Any]], many: int
) -> tuple[Any, list[Any]]:
    """Takes `many` steps at a time, from `first` on, as long as there are as many up to `end`: where it stopped, and
    the vectors."""
    before = builder.block
    test, body, done = (builder.append_basic_block(name) for name in ("test", "steps", "done"))
    builder.branch(test)
    builder.position_at_end(test)
    step, *sums = (builder.phi(kind) for kind in (INT64, *(start.type for start in starts)))
    following = builder.add(step, INT64(many))
    builder.cbranch(builder.icmp_signed("<=", following, end), body, done)
    builder.position_at_end(body)
    new = list(sums)
    for each in range(many):
        new = add(builder.add(step, INT64(each)), new)
    last = builder.block  # another one than `body` where a step has blocks of its own
    builder.branch(test)
    for phi, start, value in zip((step, *sums), (first, *starts), (following, *new), strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, last)
    builder.position_at_end(done)
    return step, sums


def _place(builder: Any, memory: Any, at: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(memory, [at]), kind.as_pointer())


def _constant(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * WIDTH)


def _operation(count: int, make: Callable[..., Any], result: Any = floats) -> Any:
    """An intrinsic of `count` vectors of floats, whose instructions `make(builder, *vectors)` writes."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return make(builder, *arguments)

    def one(_context: Any, a: Any) -> Any:
        return result(a), generate

    def two(_context: Any, a: Any, b: Any) -> Any:
        return result(a, b), generate

    def three(_context: Any, a: Any, b: Any, c: Any) -> Any:
        return result(a, b, c), generate

    return intrinsic((one, two, three)[count - 1])


def _two_to(builder: Any, x: Any) -> Any:
    scales = has_features("avx512f")
    if not scales:
        least = _constant(LEAST_POWER)
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)  # NaN stays
    whole = builder.call(function(builder, "llvm.rint.v16f32", FLOATS, [FLOATS]), [x])
    rest, power = builder.fsub(x, whole), _constant(POWERS[0])
    for factor in POWERS[1:]:
        power = multiply_add(builder, power, rest, _constant(factor))
    if scales:
        # Beyond what float32 has this gives zero.
        kinds = [FLOATS, FLOATS, FLOATS, ir.IntType(16), INT32]
        scale = function(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, kinds)
        return builder.call(scale, [power, whole, power, ir.IntType(16)(-1), INT32(4)])
    exponent = builder.add(builder.fptosi(whole, PAIRS), ir.Constant(PAIRS, [127] * WIDTH))
    return builder.fmul(power, builder.bitcast(builder.shl(exponent, ir.Constant(PAIRS, [23] * WIDTH)), FLOATS))


def _in_pairs(builder: Any, lower: Any, upper: Any) -> Any:
    narrow = function(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", HALVES, [FLOATS, FLOATS])
    halves = builder.call(narrow, [upper, lower])
    order = [index // 2 + WIDTH * (index % 2) for index in range(2 * WIDTH)]
    mixed = builder.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(INT32, 2 * WIDTH), order))
    return builder.bitcast(mixed, PAIRS)


add: Any = _operation(2, lambda builder, a, b: builder.fadd(a, b))
subtract: Any = _operation(2, lambda builder, a, b: builder.fsub(a, b))
multiply: Any = _operation(2, lambda builder, a, b: builder.fmul(a, b))
larger: Any = _operation(2, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
fused: Any = _operation(3, multiply_add)
"""a * b + c, rounded once."""
two_to: Any = _operation(1, _two_to)
"""2**x for x of at most 127, within 3e-7 of it; below -126 zero or nearly."""
in_pairs: Any = _operation(2, _in_pairs, pairs)
"""Sixteen pairs of bfloat16: of each the first from the first vector."""


def _load(_context: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return number(builder, memory_of(context, builder, signature.args[0], arguments[0]), arguments[1], FLOATS)

    return floats(array, at), generate


def _repeat(_context: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        return repeated(builder, number(builder, memory, arguments[1], ir.FloatType()), FLOATS)

    return floats(array, at), generate


def _store(_context: Any, array: Any, at: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        put(builder, memory_of(context, builder, signature.args[0], arguments[0]), arguments[1], arguments[2])
        return context.get_dummy_value()

    return types.void(array, at, vector), generate


def _integers(_context: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        return builder.sitofp(number(builder, memory, arguments[1], PAIRS), FLOATS)

    return floats(array, at), generate


def _store_narrowed(_context: Any, array: Any, at: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, half = builder.bitcast(arguments[2], PAIRS), ir.Constant(PAIRS, [16] * WIDTH)
        is_odd = builder.and_(builder.lshr(bits, half), ir.Constant(PAIRS, [1] * WIDTH))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(PAIRS, [0x7FFF] * WIDTH)))
        narrow = builder.trunc(builder.lshr(rounded, half), ir.VectorType(ir.IntType(16), WIDTH))
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        put(builder, memory, arguments[1], narrow, align=2)
        return context.get_dummy_value()

    return types.void(array, at, vector), generate


def _fill(_context: Any, value: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return repeated(builder, arguments[0], FLOATS)

    return floats(types.float32), generate


def _prefetch(_context: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        place = _place(
            builder, memory_of(context, builder, signature.args[0], arguments[0]), arguments[1], byte.pointee
        )
        fetch(builder, place, nearness=3)
        return context.get_dummy_value()

    return types.void(array, at), generate


def _total(_context: Any, vector: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kinds = [ir.FloatType(), FLOATS]
        reduce = function(builder, f"llvm.vector.reduce.fadd.v{WIDTH}f32", ir.FloatType(), kinds)
        return builder.call(reduce, [ir.FloatType()(0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(vector), generate


prefetch: Any = intrinsic(_prefetch)
"""Asks for the line of a contiguous array with this index, which may lie beyond it; nothing waits for it."""
load: Any = intrinsic(_load)
"""Sixteen float32 of a contiguous array, from an index on. Nothing looks whether they exist."""
repeat: Any = intrinsic(_repeat)
"""A vector of the one float32 that a contiguous array has at an index."""
store: Any = intrinsic(_store)
"""Writes a vector over what a contiguous array of numbers of four bytes has from an index on."""
integers: Any = intrinsic(_integers)
"""Sixteen int32 of a contiguous array, from an index on, as float32."""
store_narrowed: Any = intrinsic(_store_narrowed)
"""Writes the nearest bfloat16 of a vector's numbers (as `floats.narrowed`) from an index of a contiguous array on."""
fill: Any = intrinsic(_fill)
"""A vector of one float32."""
total: Any = intrinsic(_total)
"""The sum of a vector's float32, in whatever order."""
