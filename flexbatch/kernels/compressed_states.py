"""Keys and values in bfloat16 in some 12.4 bits a number without loss, token by token, and back.

The numbers of one head of a token are of much the same size: of normal ones, one in six thousand is smaller than the
head's largest by fifteen powers of two or more. So a number here is its sign and mantissa, a byte, and 4 bits that
count its exponent down from the head's largest; where there are more to count, the exponent is listed beside the token.
A token's bytes have a fixed length, and depend on nothing but the token: it moves with them when the cache is shifted.

Two tensors hold them, of uint8:

    codes [rows, heads, tokens, 3 / 2 head_dim + 1]
        [head_dim] sign and mantissa
        [head_dim / 2] by how much exponents are less: byte 32 i + j that of number 64 i + j (low) and of 64 i + 32 + j
        [1] largest exponent
    exceptions [rows, 1, tokens, 1 + 3 places]
        [1] how many there are
        [places, 3] head, index, exponent

An exception's code is 15, and stands for zero until the list is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.errors import IncompressibleCache
from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.threads import take, take_turns
from flexbatch.kernels.vectors import function, memory_of, number, put, repeated

BLOCK = 64
"""Numbers that are compressed and expanded together; heads have whole ones."""
LISTED_CODE = 15
LISTED_BYTES = 3
"""Of an exception."""
SMALL = 1 << 20  # numbers; with fewer, 0.16 ms on one thread, a second one costs more than it brings
TOGETHER = 8  # tokens that a thread takes at a time
HALF = BLOCK // 2
BYTES, WORDS = (ir.VectorType(ir.IntType(size), HALF) for size in (8, 16))

Compressed = tuple[torch.Tensor, ...]
"""Codes and exceptions."""


def code_bytes(head_size: int) -> int:
    """Of a token's codes of one head."""
    return head_size + head_size // 2 + 1


def compress(states: torch.Tensor, places: int, into: Compressed | None = None) -> Compressed:
    """bfloat16 `[rows, heads, tokens, head_dim]`, head_dim a multiple of 64 up to 256, heads up to 256. Written `into`
    these codes and exceptions if given, which need not lie together but for a token's. Raises IncompressibleCache where
    a token has more exceptions than `places`, up to 255."""
    assert states.dtype == torch.bfloat16
    states = states if states.stride(3) == 1 else states.contiguous()
    rows, heads, tokens, size = states.shape
    if into is None:
        codes = torch.empty(rows, heads, tokens, code_bytes(size), dtype=torch.uint8)
        into = codes, torch.empty(rows, 1, tokens, 1 + LISTED_BYTES * places, dtype=torch.uint8)
    codes, exceptions = into
    threads = 1 if states.numel() < SMALL else None
    most = np.zeros(rows * -(-tokens // TOGETHER), np.int64)
    kernel: Any = _compress
    arguments = (
        *(flat(states), tuple(states.shape), states.stride()[:3], flat(codes), codes.stride()[:3]),
        *(flat(exceptions), (exceptions.stride(0), exceptions.stride(2)), places, most),
    )
    take_turns(lambda counter, _threads: kernel(*arguments, counter), threads)
    if most.max() > places:
        raise IncompressibleCache(
            f"This model's KV cache cannot be kept compressed: of a token's {heads * size} numbers {most.max()} are "
            f"{LISTED_CODE} or more powers of two below their head's largest, and {places} may be.",
            remedy="Set offload.compressed_cache=never.",
        )
    return codes, exceptions


def expand(compressed: Compressed, out: torch.Tensor) -> None:
    """Writes to `out`, bfloat16 `[rows, heads, tokens, head_dim]`, contiguous, what was compressed."""
    codes, exceptions = compressed
    strides = codes.stride()[:3], (exceptions.stride(0), exceptions.stride(2))
    kernel: Any = _expand
    arguments = (flat(codes), strides[0], flat(exceptions), strides[1], flat(out), tuple(out.shape))
    threads = 1 if out.numel() < SMALL else None
    take_turns(lambda counter, _threads: kernel(*arguments, counter), threads)


def every(kind: Any, value: int) -> Any:
    """A constant vector of one number."""
    return ir.Constant(kind, [value] * kind.count)


def block_words(builder: Any, memory: Any, rest_at: Any, code_at: Any, highest: Any) -> tuple[Any, Any]:
    """The bfloat16 of a block, half by half, as words, with zeros for exceptions: of signs and mantissas and codes from
    two indices of `memory` on, and the largest exponent, a byte."""
    largest = builder.shl(repeated(builder, builder.zext(highest, ir.IntType(16)), WORDS), every(WORDS, 7))
    codes = builder.zext(number(builder, memory, code_at, BYTES, align=1), WORDS)
    words = []
    for half, (mask, shift) in enumerate(((0x0F, 7), (0xF0, 3))):
        # A signed byte made wider has its sign where bfloat16 has it, and in the exponent's place too.
        at = builder.add(rest_at, ir.Constant(rest_at.type, half * HALF))
        rest = builder.sext(number(builder, memory, at, BYTES, align=1), WORDS)
        code = builder.and_(codes, every(WORDS, mask))
        exponent = builder.sub(largest, builder.shl(code, every(WORDS, shift)))
        word = builder.or_(builder.and_(rest, every(WORDS, 0x807F)), exponent)
        words.append(builder.select(builder.icmp_unsigned("==", code, every(WORDS, mask)), every(WORDS, 0), word))
    return words[0], words[1]


def _expand_words(  # Numba wants the names
    _context: Any, codes: Any, rest_at: Any, code_at: Any, highest: Any, out: Any, at: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        target = memory_of(context, builder, signature.args[4], arguments[4])
        for half, words in enumerate(block_words(builder, memory, *arguments[1:4])):
            place = builder.add(arguments[5], ir.Constant(arguments[5].type, half * HALF))
            put(builder, target, place, words, align=2)
        return context.get_dummy_value()

    return types.void(codes, rest_at, code_at, highest, out, at), generate


def _exponents(builder: Any, words: Any) -> Any:
    return builder.and_(builder.lshr(words, every(WORDS, 7)), every(WORDS, 0xFF))


def _halves(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> list[Any]:
    memory = memory_of(context, builder, kind, array)
    places = (at, builder.add(at, ir.Constant(at.type, HALF)))
    return [number(builder, memory, place, WORDS, align=2) for place in places]


def _largest_exponent(_context: Any, numbers: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, two = (_exponents(builder, words) for words in _halves(context, builder, signature.args[0], *arguments))
        larger = builder.select(builder.icmp_unsigned(">", one, two), one, two)
        reduce = function(builder, f"llvm.vector.reduce.umax.v{HALF}i16", ir.IntType(16), [WORDS])
        return builder.zext(builder.call(reduce, [larger]), ir.IntType(64))

    return types.int64(numbers, at), generate


def _compress_words(_context: Any, numbers: Any, at: Any, highest: Any, codes: Any, rest_at: Any, code_at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = memory_of(context, builder, signature.args[3], arguments[3])
        largest = repeated(builder, builder.trunc(arguments[2], ir.IntType(16)), WORDS)
        packed = []
        for half, words in enumerate(_halves(context, builder, signature.args[0], *arguments[:2])):
            less = builder.sub(largest, _exponents(builder, words))
            last = every(WORDS, LISTED_CODE)
            packed.append(builder.select(builder.icmp_unsigned("<", less, last), less, last))
            sign = builder.and_(builder.lshr(words, every(WORDS, 8)), every(WORDS, 0x80))
            rest = builder.or_(sign, builder.and_(words, every(WORDS, 0x7F)))
            place = builder.add(arguments[4], ir.Constant(arguments[4].type, half * HALF))
            put(builder, target, place, builder.trunc(rest, BYTES), align=1)
        both = builder.or_(packed[0], builder.shl(packed[1], every(WORDS, 4)))
        put(builder, target, arguments[5], builder.trunc(both, BYTES), align=1)
        listed = [builder.icmp_unsigned("==", each, every(WORDS, LISTED_CODE)) for each in packed]
        which = builder.bitcast(builder.or_(*listed), ir.IntType(HALF))
        return builder.icmp_unsigned("!=", which, which.type(0))

    return types.boolean(numbers, at, highest, codes, rest_at, code_at), generate


expand_block: Any = intrinsic(_expand_words)
largest_exponent: Any = intrinsic(_largest_exponent)
"""Of a block of bfloat16, given as uint16, from an index on."""
compress_block: Any = intrinsic(_compress_words)
"""Writes a block's signs and mantissas, and its codes; whether any of these says that there is an exception."""


@njit(nogil=True, inline="always")
def joined(rest: Any, exponent: Any) -> Any:
    """A bfloat16, as uint16, of its parts."""
    kept = (np.uint16(rest & np.uint8(0x80)) << np.uint16(8)) | np.uint16(rest & np.uint8(0x7F))
    return np.uint16(kept | (np.uint16(exponent) << np.uint16(7)))


@njit(nogil=True, cache=True, error_model="numpy")
def _compress(
    numbers: Any,
    shape: Any,
    steps: Any,
    codes: Any,
    code_steps: Any,
    exceptions: Any,
    exception_steps: Any,
    places: int,
    most: Any,
    counter: Any,
) -> None:
    """`TOGETHER` tokens of a row that no other thread takes, again and again, and the most exceptions that one of them
    has. Head by head, so that what is written lies together."""
    rows, heads, tokens, size = shape
    pieces = (tokens + TOGETHER - 1) // TOGETHER
    listed = np.zeros(TOGETHER, np.int64)
    piece = take(counter)
    while piece < rows * pieces:
        row, first = piece // pieces, piece % pieces * TOGETHER
        count = min(TOGETHER, tokens - first)
        listing = row * exception_steps[0] + first * exception_steps[1]
        listed[:] = 0
        for head in range(heads):
            at = row * steps[0] + head * steps[1] + first * steps[2]
            to = row * code_steps[0] + head * code_steps[1] + first * code_steps[2]
            for token in range(count):
                if _compress_head(numbers, at, size, codes, to):
                    told = listing + token * exception_steps[1]
                    highest = codes[to + size + size // 2]
                    listed[token] = _list(numbers, at, size, head, highest, exceptions, told, places, listed[token])
                at, to = at + steps[2], to + code_steps[2]
        for token in range(count):
            exceptions[listing + token * exception_steps[1]] = min(listed[token], places)
        most[piece] = listed.max()
        piece = take(counter)


@njit(nogil=True, inline="always")
def _compress_head(numbers: Any, at: int, size: int, codes: Any, to: int) -> Any:
    """One head of a token; whether it has exceptions."""
    highest = largest_exponent(numbers, at)
    for block in range(BLOCK, size, BLOCK):
        highest = max(highest, largest_exponent(numbers, at + block))
    is_listed = False
    for block in range(0, size, BLOCK):
        is_listed |= compress_block(numbers, at + block, highest, codes, to + block, to + size + block // 2)
    codes[to + size + size // 2] = highest
    return is_listed


@njit(nogil=True)
def _list(
    numbers: Any, at: int, size: int, head: int, highest: int, exceptions: Any, listing: int, places: int, listed: int
) -> Any:
    """Lists a head's exceptions behind the `listed` ones of its token; how many that are then."""
    for index in range(size):
        exponent = (numbers[at + index] >> 7) & 0xFF
        if highest - exponent >= LISTED_CODE:
            if listed < places:
                place = listing + 1 + LISTED_BYTES * listed
                exceptions[place], exceptions[place + 1], exceptions[place + 2] = head, index, exponent
            listed += 1
    return listed


@njit(nogil=True, cache=True, error_model="numpy")
def _expand(codes: Any, steps: Any, exceptions: Any, exception_steps: Any, out: Any, shape: Any, counter: Any) -> None:
    """Pairs of a row and a head that no other thread takes."""
    rows, heads, tokens, size = shape
    pair = take(counter)
    while pair < rows * heads:
        row, head = pair // heads, pair % heads
        for column in range(tokens):
            at = row * steps[0] + head * steps[1] + column * steps[2]
            to = (pair * tokens + column) * size
            highest = codes[at + size + size // 2]
            for block in range(0, size, BLOCK):
                expand_block(codes, at + block, at + size + block // 2, highest, out, to + block)
            listing = row * exception_steps[0] + column * exception_steps[1]
            for listed in range(min(exceptions[listing], exception_steps[1] // LISTED_BYTES)):
                place = listing + 1 + LISTED_BYTES * listed
                index = exceptions[place + 1]
                if exceptions[place] == head and index < size:  # a column that nobody wrote may hold anything
                    out[to + index] = joined(codes[at + index], exceptions[place + 2])
        pair = take(counter)
