"""bfloat16 numbers in some 11.3 bits without loss, and back.

The weights of a matrix are of much the same size: of 256 exponents that a bfloat16 may have, eight in a row belong to
99 % of normal numbers, and an exponent's entropy is 2.6 bits (DFloat11, arXiv 2504.11651, section 2). So a number here
is its sign and mantissa, a byte, and 3 bits that count its exponent from the least of eight; other exponents are listed
as exceptions. A code of fixed length is a little longer than DFloat11's, and expands at the rate of memory.

A record holds `CHUNK` numbers, least significant byte first:

    uint8 least exponent, uint8 0, uint16 0, uint32 exceptions in use
    uint16 [exceptions] their places, uint8 [exceptions] their exponents
    uint8 [CHUNK / 4] lower two bits of the codes: byte i has those of numbers i, i + CHUNK / 4, ... from bit 0 on
    uint8 [CHUNK / 8] highest bit: byte i has those of numbers i, i + CHUNK / 8, ... from bit 0 on
    uint8 [CHUNK] sign and mantissa

Numbers of one byte lie far apart so that the loops over bytes become vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.threads import new_counter, on_all_threads, take, take_turns
from flexbatch.kernels.vectors import memory_of, number, prefetch, put, repeated

CHUNK = 1 << 16
QUARTER, EIGHTH = CHUNK // 4, CHUNK // 8
CODES = 8
HEADER = 8
EXPONENTS = 256
LANES = 64
BYTES, WORDS = (ir.VectorType(ir.IntType(size), LANES) for size in (8, 16))
AHEAD = 1024
"""Numbers between the ones that are expanded and those whose place in memory is asked for."""
TALLIES = 4
"""Exponents of neighbours, which are often the same, are counted apart: a core adds to the same number once in five
cycles."""
TOO_LARGE = np.uint64(0xF8F8F8F8F8F8F8F8)
"""Bits of eight codes that none has which counts to `CODES`."""
ALIGNMENT = 64
"""Bytes that a record's length is a multiple of."""


def record_bytes(exceptions: int) -> int:
    """Bytes of a record with room for so many exceptions."""
    return -(-(HEADER + 3 * exceptions + QUARTER + EIGHTH + CHUNK) // ALIGNMENT) * ALIGNMENT


def most_exceptions(numbers: torch.Tensor) -> int:
    """The most exceptions that a chunk of `numbers` (bfloat16 `[chunks, CHUNK]`, contiguous) has."""
    counts = np.zeros(len(numbers), np.int64)
    on_all_threads(lambda first, step: _count_exceptions(bits(numbers), counts, first, step))
    return int(counts.max(initial=0))


def compress(numbers: torch.Tensor, exceptions: int, records: torch.Tensor) -> None:
    """Makes `records` (zeros, uint8 `[chunks, record_bytes(exceptions)]`) of `numbers` (bfloat16 `[chunks, CHUNK]`,
    contiguous), none of whose chunks may have more `exceptions`: ValueError."""
    found = np.zeros(len(numbers), np.int64)
    on_all_threads(lambda first, step: _compress(bits(numbers), records.numpy(), exceptions, found, first, step))
    if found.max(initial=0) > exceptions:
        raise ValueError(f"a chunk has {found.max()} exceptions, and its record room for {exceptions}")


class Expansion(NamedTuple):
    """`records` with room for so many `exceptions`, and where they go: bfloat16 `[chunks, CHUNK]`, contiguous."""

    records: torch.Tensor
    exceptions: int
    out: torch.Tensor


def expand(expansions: Sequence[Expansion]) -> None:
    """All of them, in turn; threads take the next chunk as they are free."""
    work = [(new_counter(), each.records.numpy(), each.exceptions, bits(each.out)) for each in expansions]

    def share(_counter: Any, _threads: int) -> None:
        for each in work:
            _expand(*each)

    take_turns(share)


@njit(nogil=True)
def _least_exponent(numbers: Any, counts: Any) -> Any:
    """The least of the eight exponents that most numbers of a chunk have, and how many have others."""
    counts[:] = 0
    for place in range(0, CHUNK, TALLIES):
        for tally in range(TALLIES):
            counts[tally, (numbers[place + tally] >> np.uint16(7)) & np.uint16(0xFF)] += 1
    for tally in range(1, TALLIES):
        counts[0] += counts[tally]
    counts = counts[0]
    within = counts[:CODES].sum()
    best, least = within, 0
    for first in range(1, EXPONENTS - CODES + 1):
        within += counts[first + CODES - 1] - counts[first - 1]
        if within > best:
            best, least = within, first
    return least, CHUNK - best


@njit(nogil=True, cache=True, error_model="numpy")
def _count_exceptions(numbers: Any, found: Any, first: int, step: int) -> None:
    """Every `step`-th chunk from `first` on."""
    counts = np.empty((TALLIES, EXPONENTS), np.int64)
    for chunk in range(first, len(numbers), step):
        found[chunk] = _least_exponent(numbers[chunk], counts)[1]


@njit(nogil=True, inline="always")
def _parts(record: Any, exceptions: int) -> Any:
    """Places and exponents of the exceptions, lower bits, highest bits, signs and mantissas."""
    exponents = HEADER + 2 * exceptions
    lower = exponents + exceptions
    highest = lower + QUARTER
    rest = highest + EIGHTH
    return (
        record[HEADER:exponents].view(np.uint16),
        record[exponents:lower],
        record[lower:highest],
        record[highest:rest],
        record[rest : rest + CHUNK],
    )


@njit(nogil=True)
def _split(numbers: Any, least: Any, codes: Any, rest: Any) -> None:
    """Signs and mantissas, and exponents counted from the least, where one that is less begins again at the top."""
    for place in range(CHUNK):
        number = numbers[place]
        codes[place] = np.uint8((number >> np.uint16(7)) - np.uint16(least))
        rest[place] = np.uint8((number >> np.uint16(8)) & np.uint16(0x80)) | np.uint8(number & np.uint16(0x7F))


@njit(nogil=True)
def _list_exceptions(codes: Any, least: Any, places: Any, exponents: Any) -> Any:
    """Takes codes that do not fit out, and lists what they were; how many."""
    listed, words = 0, codes.view(np.uint64)
    for word in range(len(words)):
        if words[word] & TOO_LARGE:
            for place in range(8 * word, 8 * word + 8):
                if codes[place] >= CODES:
                    places[listed], exponents[listed] = place, np.uint8(codes[place] + least)
                    listed, codes[place] = listed + 1, 0
    return listed


@njit(nogil=True)
def _pack_codes(codes: Any, lower: Any, highest: Any) -> None:
    """Loops without slices, which the compiler makes vectors of."""
    for index in range(QUARTER):
        packed = np.uint8(0)
        for part in range(CHUNK // QUARTER):
            packed |= (codes[index + part * QUARTER] & np.uint8(3)) << np.uint8(2 * part)
        lower[index] = packed
    for index in range(EIGHTH):
        packed = np.uint8(0)
        for part in range(CHUNK // EIGHTH):
            packed |= (codes[index + part * EIGHTH] >> np.uint8(2)) << np.uint8(part)
        highest[index] = packed


@njit(nogil=True, cache=True, error_model="numpy")
def _compress(numbers: Any, records: Any, exceptions: int, found: Any, first: int, step: int) -> None:
    """Every `step`-th chunk from `first` on, unless it has more than so many exceptions; `records` are zeros."""
    counts, codes = np.empty((TALLIES, EXPONENTS), np.int64), np.empty(CHUNK, np.uint8)
    for chunk in range(first, len(numbers), step):
        places, exponents, lower, highest, rest = _parts(records[chunk], exceptions)
        least, found[chunk] = _least_exponent(numbers[chunk], counts)
        if found[chunk] > exceptions:
            continue
        _split(numbers[chunk], least, codes, rest)
        listed = _list_exceptions(codes, least, places, exponents)
        _pack_codes(codes, lower, highest)
        records[chunk, 0] = least
        records[chunk, 4:HEADER].view(np.uint32)[0] = listed


def _join_lanes(
    _context: Any,
    lower: Any,
    lower_at: Any,
    by: Any,
    highest: Any,
    highest_at: Any,
    top: Any,
    rest: Any,
    out: Any,
    at: Any,
    least: Any,
) -> Any:
    """`LANES` numbers from the bits `by` and `by` + 1 of `lower`, bit `top` of `highest`, and `rest`; `least` is the
    least exponent, in its place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args

        def loaded(which: int, where: int, widen: Any) -> Any:
            memory = memory_of(context, builder, kinds[which], arguments[which])
            return widen(number(builder, memory, arguments[where], BYTES, align=1), WORDS)

        def every(value: int) -> Any:
            return ir.Constant(WORDS, [value] * LANES)

        low = builder.lshr(loaded(0, 1, builder.zext), repeated(builder, arguments[2], WORDS))
        high = builder.lshr(loaded(3, 4, builder.zext), repeated(builder, arguments[5], WORDS))
        code = builder.or_(
            builder.shl(builder.and_(low, every(3)), every(7)), builder.shl(builder.and_(high, every(1)), every(9))
        )
        # A signed byte made wider has its sign where bfloat16 has it, and in the exponent's place too.
        kept = builder.and_(loaded(6, 8, builder.sext), every(0x807F))
        exponent = builder.add(code, repeated(builder, arguments[9], WORDS))
        memory = memory_of(context, builder, kinds[7], arguments[7])
        put(builder, memory, arguments[8], builder.or_(kept, exponent), align=2)
        return context.get_dummy_value()

    return types.void(lower, lower_at, by, highest, highest_at, top, rest, out, at, least), generate


_join: Any = intrinsic(_join_lanes)


@njit(nogil=True)
def expand_record(record: Any, exceptions: int, numbers: Any) -> None:
    """In a kernel: the numbers, as uint16 `[CHUNK]`, of a record with room for so many exceptions."""
    places, exponents, lower, highest, rest = _parts(record, exceptions)
    least = np.uint16(np.uint16(record[0]) << np.uint16(7))
    for eighth in range(CHUNK // EIGHTH):
        start, begun = eighth % 2 * EIGHTH, eighth * EIGHTH
        by, top = np.uint16(eighth // 2 * 2), np.uint16(eighth)
        for index in range(0, EIGHTH, LANES):
            prefetch(rest, begun + index + AHEAD)
            prefetch(numbers, begun + index + AHEAD)
            prefetch(numbers, begun + index + AHEAD + LANES // 2)
            _join(lower, start + index, by, highest, index, top, rest, numbers, begun + index, least)
    for index in range(record[4:HEADER].view(np.uint32)[0]):
        place = places[index]
        kept = numbers[place] & np.uint16(0x807F)
        numbers[place] = np.uint16(kept | (np.uint16(exponents[index]) << np.uint16(7)))


@njit(nogil=True, cache=True, error_model="numpy")
def _expand(counter: Any, records: Any, exceptions: int, out: Any) -> None:
    chunk = take(counter)
    while chunk < len(records):
        expand_record(records[chunk], exceptions, out[chunk])
        chunk = take(counter)
