# SPDX-License-Identifier: Apache-2.0
# A kernel takes its arguments one by one, is one function, and has numbers of its own.
# Triton reads annotations as code, so kernels have none.
# ruff: noqa: ANN001, ANN202, C901, PLR0912, PLR0913, PLR0915, PLR0917, PLR2004, SIM102
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The statistics in one pass on a GPU, as one Triton kernel.

A launch measures all spans of a table. A span has one program or many; a program reads
tiles of 64 consecutive indices each, and the last program of a span to end adds the
others' rows up, always in the same order: equal inputs give equal bits.

Whole aligned blocks of floats go the fast way: a lane loads words of its block from
where the block's hash says that its buckets' elements are, so that sketch and checksum
need no exchange between lanes, and computes the hash once for all its words. It takes
everything for finite. The rest, and what was not finite, goes the general way, one
element a lane.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pytest_msprobe.model import records
from pytest_msprobe.statistics.checksum import word_factors
from pytest_msprobe.statistics.reference import ReferenceBackend
from pytest_msprobe.statistics.sketch import SEED
from pytest_msprobe.statistics.spec import Span, as_rows, collapse

# A program's warps, and the registers of a thread, so that a processor has room for two
# programs.
_WARPS = 8
_REGISTERS = 128
# Bytes that a program reads at a time.
_TILE_BYTES = 8192
# Blocks that it reads at a time where it takes single elements.
_GENERAL_TILE = 16
# Tiles of a span that one program reads, of a program of a larger one, and the most
# programs that a span has: all that run at a time on the largest GPU measured.
_ALONE_TILES = 8
_PART_TILES = 5
MOST_PARTS = 264
# From so many programs on the table is copied to the GPU first.
_COPIED_PROGRAMS = 128
# Rows of programs that are added up together.
_GROUP = 32
# Partial rows that a launch may leave, and numbers of each.
SCRATCH_ROWS = 8192
_PARTIAL_WIDTH = 80
# An entry of the table: address, slot, rows, columns, bytes from row to row, first
# index, index step from row to row; programs and, 16 bits up, its first partial row.
ENTRY_WIDTH = 8
_SLOT, _FIRST_INDEX, _PROGRAMS = 1, 5, 7
# A program that is not the first of its span: number of the entry, its own number.
PART_BITS = 12
# Entries of a half of the table, and what the other programs do in the room of one.
_HALF = 4096
_ENTRY_NUMBERS = 2 * ENTRY_WIDTH
_ENTRY_BYTES = 8 * ENTRY_WIDTH
_PLACE, _NUMBER = struct.Struct("<2q"), struct.Struct("<q")
# Up to so many tensors are placed in the table one by one.
_FEW = 10

_ENTRY = tl.constexpr(ENTRY_WIDTH)
_PART_BITS = tl.constexpr(PART_BITS)
_PART_MASK = tl.constexpr((1 << PART_BITS) - 1)
_SEED = tl.constexpr(SEED)
_PARTIAL = tl.constexpr(_PARTIAL_WIDTH)
_HEAD = tl.constexpr(16)  # the columns before the sketch, as a power of two
_ROW = tl.constexpr(records.ROW_WIDTH)
_MAXIMUM = tl.constexpr(records.MAXIMUM)
_MINIMUM = tl.constexpr(records.MINIMUM)
_TOTAL = tl.constexpr(records.TOTAL)
_SQUARES = tl.constexpr(records.SQUARES)
_NAN = tl.constexpr(records.NAN)
_PLUS = tl.constexpr(records.POSITIVE_INF)
_MINUS = tl.constexpr(records.NEGATIVE_INF)
_COUNT = tl.constexpr(records.COUNT)
_CHECKSUM = tl.constexpr(records.CHECKSUM)
_SKETCH = tl.constexpr(records.SKETCH)
_LEAST = tl.constexpr(-(2**63))
_MOST = tl.constexpr(2**63 - 1)


class _Kind(NamedTuple):
    """How elements of a type are read.

    Attributes:
        bits: Type of their bits.
        size: Their bytes.
        value: The float type that the bits stand for, None for integers.
    """

    bits: Any
    size: int
    value: Any


_KINDS = {
    torch.bfloat16: _Kind(tl.int16, 2, tl.bfloat16),
    torch.float16: _Kind(tl.int16, 2, tl.float16),
    torch.float32: _Kind(tl.int32, 4, tl.float32),
    torch.bool: _Kind(tl.int8, 1, None),
    torch.int8: _Kind(tl.int8, 1, None),
    torch.uint8: _Kind(tl.uint8, 1, None),
    torch.int16: _Kind(tl.int16, 2, None),
    torch.int32: _Kind(tl.int32, 4, None),
    torch.int64: _Kind(tl.int64, 8, None),
}


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _factor_of(base):
    """The checksum's factor of a block."""
    high = _mix(base + 0xDAA66D2B).to(tl.int64) << 32
    return (high + _mix(base + 0x78DDE6E4).to(tl.int64)) | 1


@triton.jit
def _move_halves(low, high, turn, has_ptx: tl.constexpr):
    """The four halves of two words, that at i moved to i ^ turn."""
    if has_ptx:
        chosen = 0x3210 ^ (turn * 0x2222)
        first = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, chosen],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, chosen ^ 0x4444],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        is_crossed = (turn & 2) != 0
        first = tl.where(is_crossed, high, low)
        second = tl.where(is_crossed, low, high)
        is_crossed = (turn & 1) != 0
        first = tl.where(is_crossed, (first << 16) | ((first >> 16) & 65535), first)
        second = tl.where(is_crossed, (second << 16) | ((second >> 16) & 65535), second)
    return first, second


@triton.jit
def _extremes(top, bottom, word, value: tl.constexpr):
    """The larger and the smaller halves of words, both halves at once."""
    kind: tl.constexpr = "bf16x2" if value == tl.bfloat16 else "f16x2"
    larger: tl.constexpr = "max." + kind + " $0, $1, $2;"
    smaller: tl.constexpr = "min." + kind + " $0, $1, $2;"
    top = tl.inline_asm_elementwise(
        larger, "=r,r,r", [top, word], dtype=tl.int32, is_pure=True, pack=1
    )
    bottom = tl.inline_asm_elementwise(
        smaller, "=r,r,r", [bottom, word], dtype=tl.int32, is_pure=True, pack=1
    )
    return top, bottom


@triton.jit
def _low_half(word, value: tl.constexpr):
    if value == tl.bfloat16:
        x = (word << 16).to(tl.float32, bitcast=True)
    else:
        x = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _high_half(word, value: tl.constexpr):
    if value == tl.bfloat16:
        x = (word & -65536).to(tl.float32, bitcast=True)
    else:
        x = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _signed(x, bits):
    """A number, its sign changed where the highest bit is set."""
    changed = x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)
    return changed.to(tl.float32, bitcast=True)


@triton.jit
def _turn_bits(bits, turn, has_two: tl.constexpr):
    """The bit at i moved to i ^ turn."""
    right, left = bits >> 1, bits << 1
    crossed = left ^ ((left ^ right) & 0x55555555)
    bits = tl.where((turn & 1) != 0, crossed, bits)
    if has_two:
        right, left = bits >> 2, bits << 2
        crossed = left ^ ((left ^ right) & 0x33333333)
        bits = tl.where((turn & 2) != 0, crossed, bits)
    return bits


@triton.jit
def _load_tile(
    row,
    block,
    blocks,
    inverse,
    number,
    number_step,
    origin,
    row_bytes,
    q,
    wanted,
    tile: tl.constexpr,
    size: tl.constexpr,
    is_complete: tl.constexpr,
):
    """Hashes and pairs of words of the blocks of a tile.

    Args:
        row: Row of the first block; the others follow, over the ends of rows.
        block: Its place in the row.
        blocks: Of a row.
        inverse: 2**31 / blocks rounded up, 0 for a single row.
        number: Of the first row's first block.
        number_step: From row to row.
        origin: Address of the first row's first block.
        row_bytes: From row to row.
        q: A lane's buckets, divided by those of a pair of words.
        wanted: `tile` if there is such a tile, else 0.
        tile: Blocks.
        size: Bytes of an element.
        is_complete: Whether lanes load what belongs into their buckets.
    """
    lane = tl.arange(0, tile)[None, :, None]
    near = block + lane
    twice = (near * 2).to(tl.uint32)
    over = tl.umulhi(twice, tl.zeros_like(twice) + inverse).to(tl.int32)
    near -= over * blocks
    row += over
    above = _mix(tl.zeros([1, 1, 1], tl.uint32) + _SEED)
    name = (number + row * number_step + near).to(tl.uint32, bitcast=True)
    base = _mix(name ^ above)
    shift: tl.constexpr = 28 if size == 2 else 27
    at = origin + row * row_bytes + near.to(tl.int64) * (64 * size)
    at = at.to(tl.pointer_type(tl.int64))
    if is_complete:
        # Not so, but lanes that share a block must lie side by side in a warp, and this
        # is how Triton is told; it loads no vectors, as nothing is known of `origin`.
        at = tl.max_contiguous(
            at + (q ^ (base >> shift).to(tl.int32)), [1, 2, q.shape[2]]
        )
    else:
        at = tl.multiple_of(at, [16, 16, 16]) + q
    pairs = tl.load(at, mask=lane < wanted, other=0)
    # All lanes get the hash, though those of a block get the same: no exchange.
    return tl.broadcast_to(base, pairs.shape), pairs


@triton.jit
def _add_tile(
    base,
    pairs,
    q,
    sums,
    powers,
    highest,
    lowest,
    words_0,
    words_1,
    uppers_0,
    uppers_1,
    buckets_0,
    buckets_1,
    buckets_2,
    buckets_3,
    size: tl.constexpr,
    value: tl.constexpr,
    has_ptx: tl.constexpr,
    is_complete: tl.constexpr,
):
    """Adds a tile to what a program's lanes have summed up."""
    is_packed: tl.constexpr = has_ptx and size == 2
    turn = (base >> 26).to(tl.int32)
    low, high = pairs.to(tl.int32), (pairs >> 32).to(tl.int32)
    if is_packed:
        highest, lowest = _extremes(highest, lowest, low, value)
        highest, lowest = _extremes(highest, lowest, high, value)
    if is_complete:
        # A bit that is set changes a sign. Those of a lane's elements are brought to
        # places that are the same in all lanes.
        signs_0 = ~_mix(base + 0x9E3779B9)
        signs_1 = ~_mix(base + 0x3C6EF372)
        is_crossed = (turn & 32) != 0
        first = tl.where(is_crossed, signs_1, signs_0)
        second = tl.where(is_crossed, signs_0, signs_1)
        near: tl.constexpr = q.shape[2]
        across: tl.constexpr = 4 if size == 2 else 2  # elements of a pair of words
        away = (turn ^ (tl.arange(0, near)[None, None, :] * across)) & (32 - across)
        away = away.to(tl.uint32)
        first = (first >> away) | (first << ((32 - away) & 31))
        second = (second >> away) | (second << ((32 - away) & 31))
        signs = (first & 0x000F000F) | ((second & 0x000F000F) << 4)
        signs = _turn_bits(signs, turn, size == 2)
        part = q // near  # of a lane's four
        up = (31 - (part & 1) * 16 - (part >> 1) * 4).to(tl.uint32)
        is_crossed = (turn & (across // 2)) != 0
        first = tl.where(is_crossed, high, low)
        second = tl.where(is_crossed, low, high)
        # The factor's halves apart: one instruction less a word.
        first, second = (
            first.to(tl.uint32, bitcast=True),
            second.to(tl.uint32, bitcast=True),
        )
        factor = _mix(base + 0x78DDE6E4) | 1
        words_0 += first.to(tl.int64) * factor.to(tl.int64)
        words_1 += second.to(tl.int64) * factor.to(tl.int64)
        factor = _mix(base + 0xDAA66D2B)
        uppers_0 += first * factor
        uppers_1 += second * factor
        if size == 2:
            low, high = _move_halves(low, high, turn & 3, has_ptx)
        else:
            low, high = (
                first.to(tl.int32, bitcast=True),
                second.to(tl.int32, bitcast=True),
            )
    if size == 2:
        x_0, x_1 = _low_half(low, value), _high_half(low, value)
        x_2, x_3 = _low_half(high, value), _high_half(high, value)
        sums += (x_0 + x_1) + (x_2 + x_3)
        powers += x_0 * x_0
        powers += x_1 * x_1
        powers += x_2 * x_2
        powers += x_3 * x_3
        if is_complete:
            buckets_0 += _signed(x_0, signs << up)
            buckets_1 += _signed(x_1, signs << (up - 1))
            buckets_2 += _signed(x_2, signs << (up - 2))
            buckets_3 += _signed(x_3, signs << (up - 3))
        if not is_packed:
            larger = tl.maximum(tl.maximum(x_0, x_1), tl.maximum(x_2, x_3))
            smaller = tl.minimum(tl.minimum(x_0, x_1), tl.minimum(x_2, x_3))
            highest = tl.maximum(highest, larger)
            lowest = tl.minimum(lowest, smaller)
    else:
        x_0 = low.to(tl.float32, bitcast=True)
        x_1 = high.to(tl.float32, bitcast=True)
        sums += x_0 + x_1
        powers += x_0 * x_0
        powers += x_1 * x_1
        if is_complete:
            buckets_0 += _signed(x_0, signs << up)
            buckets_1 += _signed(x_1, signs << (up - 1))
        highest = tl.maximum(highest, tl.maximum(x_0, x_1))
        lowest = tl.minimum(lowest, tl.minimum(x_0, x_1))
    return (
        sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
        buckets_0, buckets_1, buckets_2, buckets_3,
    )  # fmt: skip


@triton.jit
def _store_row(at, top, bottom, total, squares, nan, plus, minus, count, words, sketch):
    floats = at.to(tl.pointer_type(tl.float64))
    integers = at.to(tl.pointer_type(tl.int64))
    if top.dtype == tl.int64:
        tl.store(integers + _MAXIMUM, top)
        tl.store(integers + _MINIMUM, bottom)
    else:
        tl.store(floats + _MAXIMUM, top.to(tl.float64))
        tl.store(floats + _MINIMUM, bottom.to(tl.float64))
    tl.store(floats + _TOTAL, total)
    tl.store(floats + _SQUARES, squares)
    tl.store(integers + _NAN, nan)
    tl.store(integers + _PLUS, plus)
    tl.store(integers + _MINUS, minus)
    tl.store(integers + _COUNT, count)
    tl.store(integers + _CHECKSUM, words)
    tl.store(floats + _SKETCH + tl.arange(0, 64), sketch)


@triton.jit
def _add_rows(source, first, count, target, is_float: tl.constexpr):
    """Adds partial rows up, from first to last, 16 at a time."""
    bucket, column = tl.arange(0, 64), tl.arange(0, _HEAD)
    sketch = tl.zeros([64], tl.float64)
    sums = tl.zeros([_HEAD], tl.float64)
    counts = tl.zeros([_HEAD], tl.int64)
    if is_float:
        top = tl.full([_HEAD], float("-inf"), tl.float64)
        bottom = tl.full([_HEAD], float("inf"), tl.float64)
    else:
        top = tl.full([_HEAD], _LEAST, tl.int64)
        bottom = tl.full([_HEAD], _MOST, tl.int64)
    done = 0
    while done < count:
        number = done + tl.arange(0, 16)
        inside = (number < count)[:, None]
        row = (source + (first + number).to(tl.int64) * (_PARTIAL * 8))[:, None]
        # Never from a cache that other programs' writes do not reach.
        at = (row + (bucket + _SKETCH)[None, :] * 8).to(tl.pointer_type(tl.float64))
        values = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        sketch += tl.sum(values, axis=0)
        at = (row + column[None, :] * 8).to(tl.pointer_type(tl.int64))
        bits = tl.load(at, mask=inside, other=0, cache_modifier=".cg")
        counts += tl.sum(bits, axis=0)
        values = bits.to(tl.float64, bitcast=True)
        sums += tl.sum(values, axis=0)
        if is_float:
            some = tl.max(tl.where(inside, values, float("-inf")), axis=0)
            top = tl.maximum(top, some)
            some = tl.min(tl.where(inside, values, float("inf")), axis=0)
            bottom = tl.minimum(bottom, some)
        else:
            top = tl.maximum(top, tl.max(tl.where(inside, bits, _LEAST), axis=0))
            bottom = tl.minimum(bottom, tl.min(tl.where(inside, bits, _MOST), axis=0))
        done += 16
    floats = target.to(tl.pointer_type(tl.float64))
    integers = target.to(tl.pointer_type(tl.int64)) + column
    tl.store(floats + _SKETCH + bucket, sketch)
    floats += column
    is_sum = (column == _TOTAL) | (column == _SQUARES)
    tl.store(floats, sums, mask=is_sum)
    tl.store(integers, counts, mask=(column >= _NAN) & (column <= _CHECKSUM))
    if is_float:
        tl.store(floats, top, mask=column == _MAXIMUM)
        tl.store(floats, bottom, mask=column == _MINIMUM)
    else:
        tl.store(integers, top, mask=column == _MAXIMUM)
        tl.store(integers, bottom, mask=column == _MINIMUM)


_NEVER_SPECIAL = (
    "table", "parts_of", "factors", "scratch", "counters", "out", "entries",
)  # fmt: skip


@triton.jit(
    do_not_specialize=_NEVER_SPECIAL, do_not_specialize_on_alignment=_NEVER_SPECIAL
)
def _measure_kernel(
    table,
    parts_of,
    factors,
    scratch,
    counters,
    out,
    entries,
    bits_type: tl.constexpr,
    size: tl.constexpr,
    value: tl.constexpr,
    has_ptx: tl.constexpr,
    is_complete: tl.constexpr,
    tile: tl.constexpr,
    near: tl.constexpr,
    far: tl.constexpr,
    general: tl.constexpr,
    group: tl.constexpr,
):
    """Measures the spans of a table.

    Args:
        table: Address of the entries.
        parts_of: Address of what the programs behind one for each entry do.
        factors: Address of the checksum's factors of words.
        scratch: Address of partial rows.
        counters: Address of as many int32, zero between launches.
        out: Address of the rows.
        entries: Of the table.
        bits_type: Of an element.
        size: Its bytes.
        value: The float type that the bits stand for, None for integers.
        has_ptx: Whether the device knows PTX of compute capability 8.0.
        is_complete: Whether sketch and checksum are wanted as well.
        tile: Blocks of the fast way's steps.
        near: Lanes side by side that share a block.
        far: Pairs of words that each of them has of it.
        general: Blocks of the general way's steps.
        group: Partial rows that are added up together.
    """
    number, part = tl.program_id(0), 0
    if number >= entries:
        which = tl.load(parts_of.to(tl.pointer_type(tl.int32)) + number - entries)
        number, part = which >> _PART_BITS, which & _PART_MASK
    entry = table.to(tl.pointer_type(tl.int64)) + number * _ENTRY
    address, slot = tl.load(entry), tl.load(entry + 1)
    rows, columns = tl.load(entry + 2), tl.load(entry + 3)
    row_bytes = tl.load(entry + 4)
    first_index, index_stride = tl.load(entry + 5), tl.load(entry + 6)
    places = tl.load(entry + 7)
    parts, partial = (places & 65535).to(tl.int32), (places >> 16).to(tl.int32)

    first_lane = (first_index & 63).to(tl.int32)
    blocks = ((columns + 126) // 64).to(tl.int32)  # wherever in a block rows begin
    # The fast way: so many tiles of whole blocks, behind a first one that is not whole.
    tiles = 0
    edge = 0
    if value is not None:
        origin = address - first_lane * size
        is_aligned = ((origin | row_bytes) & (7 if is_complete else 15)) == 0
        is_line = rows == 1
        has_whole = ((columns | index_stride | first_index) & 63) == 0
        has_whole = has_whole & (columns < 1 << 21)
        is_low = first_index + (rows - 1) * index_stride + columns < 2**37
        if is_aligned & is_low & (is_line | has_whole):
            blocks = ((columns + first_lane + 63) // 64).to(tl.int32)
            edge = (first_lane != 0).to(tl.int32)
            inside = ((columns + first_lane) // 64).to(tl.int32) * rows.to(tl.int32)
            tiles = tl.maximum(inside - edge, 0) // tile
    units = blocks * rows.to(tl.int32)

    total = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    words = tl.zeros([], tl.int64)
    sketch = tl.zeros([64], tl.float64)
    nan = tl.zeros([], tl.int64)
    plus = tl.zeros([], tl.int64)
    minus = tl.zeros([], tl.int64)
    if value is None:
        top = tl.full([], _LEAST, tl.int64)
        bottom = tl.full([], _MOST, tl.int64)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        bottom = tl.full([], float("inf"), tl.float32)
    has_failed = tiles == 0
    if value is not None:
        if part < tiles:
            q = tl.arange(0, far)[:, None, None] * near
            q = q + tl.arange(0, near)[None, None, :]
            sums = tl.zeros([far, tile, near], tl.float32)
            powers = tl.zeros([far, tile, near], tl.float32)
            buckets_0 = tl.zeros([far, tile, near], tl.float32)
            buckets_1 = tl.zeros([far, tile, near], tl.float32)
            buckets_2 = tl.zeros([far, tile, near], tl.float32)
            buckets_3 = tl.zeros([far, tile, near], tl.float32)
            words_0 = tl.zeros([far, tile, near], tl.int64)
            words_1 = tl.zeros([far, tile, near], tl.int64)
            uppers_0 = tl.zeros([far, tile, near], tl.uint32)
            uppers_1 = tl.zeros([far, tile, near], tl.uint32)
            is_packed: tl.constexpr = has_ptx and size == 2
            if is_packed:
                # Two infinities.
                infinities: tl.constexpr = (
                    0x7F807F80 if value == tl.bfloat16 else 0x7C007C00
                )
                lowest = tl.full([far, tile, near], infinities, tl.int32)
                highest = lowest ^ -2147450880
            else:
                highest = tl.full([far, tile, near], float("-inf"), tl.float32)
                lowest = tl.full([far, tile, near], float("inf"), tl.float32)
            name = (first_index >> 6).to(tl.int32)
            name_step = (index_stride >> 6).to(tl.int32)
            inverse = (blocks - 1).to(tl.uint32) + 0x80000000
            inverse = inverse // blocks.to(tl.uint32)
            inverse = tl.where(rows == 1, 0, inverse).to(tl.uint32)
            start = edge + part * tile
            row = start // blocks
            block = start - row * blocks
            row_step = parts * tile // blocks
            block_step = parts * tile - row_step * blocks
            base, pairs = _load_tile(
                row, block, blocks, inverse, name, name_step, origin, row_bytes, q,
                tile, tile, size, is_complete,
            )  # fmt: skip
            done = part
            # Two tiles by turns: the next is on its way while one is added up.
            while done + parts < tiles:
                block += block_step
                is_over = block >= blocks
                row += row_step + is_over.to(tl.int32)
                block = tl.where(is_over, block - blocks, block)
                next_base, next_pairs = _load_tile(
                    row, block, blocks, inverse, name, name_step, origin, row_bytes, q,
                    tile, tile, size, is_complete,
                )  # fmt: skip
                (
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                ) = _add_tile(
                    base, pairs, q,
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                    size, value, has_ptx, is_complete,
                )  # fmt: skip
                done += 2 * parts
                block += block_step
                is_over = block >= blocks
                row += row_step + is_over.to(tl.int32)
                block = tl.where(is_over, block - blocks, block)
                base, pairs = _load_tile(
                    row, block, blocks, inverse, name, name_step, origin, row_bytes, q,
                    tl.where(done < tiles, tile, 0), tile, size, is_complete,
                )  # fmt: skip
                (
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                ) = _add_tile(
                    next_base, next_pairs, q,
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                    size, value, has_ptx, is_complete,
                )  # fmt: skip
            if done < tiles:
                (
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                ) = _add_tile(
                    base, pairs, q,
                    sums, powers, highest, lowest, words_0, words_1, uppers_0, uppers_1,
                    buckets_0, buckets_1, buckets_2, buckets_3,
                    size, value, has_ptx, is_complete,
                )  # fmt: skip

            squares = tl.sum(powers.to(tl.float64))
            # Where something was not finite the tiles are read again.
            has_failed = (squares < float("inf")) == 0
            if has_failed:
                squares = tl.zeros([], tl.float64)
            else:
                total = tl.sum(sums.to(tl.float64))
                if is_packed:
                    larger = _low_half(highest, value)
                    smaller = _low_half(lowest, value)
                    top = tl.max(tl.maximum(larger, _high_half(highest, value)))
                    bottom = tl.min(tl.minimum(smaller, _high_half(lowest, value)))
                else:
                    top = tl.max(highest)
                    bottom = tl.min(lowest)
                if is_complete:
                    place = tl.arange(0, far)[:, None] * near
                    place = (place + tl.arange(0, near)[None, :]) * 2
                    at = factors.to(tl.pointer_type(tl.int64)) + place
                    words_0 += uppers_0.to(tl.int64) << 32
                    words_1 += uppers_1.to(tl.int64) << 32
                    sums_0 = tl.sum(words_0, axis=1) * tl.load(at)
                    sums_1 = tl.sum(words_1, axis=1) * tl.load(at + 1)
                    words = tl.sum(sums_0 + sums_1)
                    sketch_0 = tl.sum(buckets_0.to(tl.float64), axis=1)
                    sketch_1 = tl.sum(buckets_1.to(tl.float64), axis=1)
                    if size == 2:
                        sketch_2 = tl.sum(buckets_2.to(tl.float64), axis=1)
                        sketch_3 = tl.sum(buckets_3.to(tl.float64), axis=1)
                        sketch_0 = tl.join(sketch_0, sketch_2)
                        sketch_1 = tl.join(sketch_1, sketch_3)
                    sketch = tl.reshape(tl.join(sketch_0, sketch_1), [64])

    # The general way: a program's own tiles, then, for the last one, what is no tile.
    again = 0
    if has_failed:
        own_tiles = tl.where(tiles > 0, tiles, (units + tile - 1) // tile)
        again = (own_tiles - part + parts - 1) // parts * tile
    rest = tl.where((tiles > 0) & (part == parts - 1), units - tiles * tile, 0)
    if again + rest > 0:
        begin = tl.where(tiles > 0, edge, 0)
        end = tl.where(tiles > 0, edge + tiles * tile, units)
        p = tl.arange(0, 4)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
        checksum = tl.zeros([4, general, 16], tl.int64)
        if size == 8:
            checksum_high = tl.zeros([4, general, 16], tl.int64)
        if value is None:
            largest = tl.full([4, general, 16], _LEAST, tl.int64)
            smallest = tl.full([4, general, 16], _MOST, tl.int64)
        else:
            largest = tl.full([4, general, 16], float("-inf"), tl.float32)
            smallest = tl.full([4, general, 16], float("inf"), tl.float32)
            sums_0 = tl.zeros([4, general, 16], tl.float32)
            powers_0 = tl.zeros([4, general, 16], tl.float32)
            buckets = tl.zeros([4, general, 16], tl.float32)
            # NaN, +Inf and -Inf seen, 21 bits each.
            odd = tl.zeros([4, general, 16], tl.int64)
        done = 0
        while done < again + rest:
            count = done + tl.arange(0, general)[None, :, None]
            mine = begin + (part + count // tile * parts) * tile + count % tile
            other = count - again
            is_mine = count < again
            unit = tl.where(other >= edge, other + tiles * tile, other)
            unit = tl.where(is_mine, mine, unit)
            is_unit = (is_mine & (mine < end)) | ((other >= 0) & (other < rest))
            unit = tl.where(is_unit, unit, 0)
            row = (unit // blocks).to(tl.int64)
            block = (unit % blocks).to(tl.int64)
            index = first_index + row * index_stride
            lane = (index & 63).to(tl.int32)
            name = (index >> 6) + block
            base = _mix(
                (name & 0xFFFFFFFF).to(tl.uint32)
                ^ _mix(((name >> 32) + _SEED).to(tl.uint32))
            )
            c = p ^ (base >> 26).to(tl.int32)
            # Bytes from the unit's first lane; 32 bits are enough within a block.
            left = tl.minimum(columns - block * 64 + lane, 64).to(tl.int32)
            left = tl.where(is_unit, left, 0)
            skip = tl.where(block == 0, lane, 0)
            valid = (c >= skip) & (c < left)
            at = address + row * row_bytes + (block * 64 - lane) * size
            at = (at + c * size).to(tl.pointer_type(bits_type))
            at = tl.max_contiguous(at, [1, 2, 16])  # see _load_tile
            bits = tl.load(at, mask=valid, other=0)

            factor = _factor_of(base)
            if size < 4:
                word = bits.to(tl.uint32) & ((1 << (8 * size)) - 1)
                word = word << (8 * ((c * size) & 3)).to(tl.uint32)
                checksum += word.to(tl.int64) * factor
            elif size == 4:
                checksum += bits.to(tl.uint32, bitcast=True).to(tl.int64) * factor
            else:
                word = bits.to(tl.int64)
                checksum += (word & 0xFFFFFFFF) * factor
                checksum_high += ((word >> 32) & 0xFFFFFFFF) * factor

            if value is None:
                x = bits.to(tl.int64)
                largest = tl.maximum(largest, tl.where(valid, x, _LEAST))
                smallest = tl.minimum(smallest, tl.where(valid, x, _MOST))
            else:
                x = bits.to(value, bitcast=True).to(tl.float32)
                is_finite = tl.abs(x) < float("inf")
                kind = tl.where(x > 0, 1 << 21, tl.where(x < 0, 1 << 42, 1))
                odd += tl.where(is_finite, 0, kind.to(tl.int64))
                counts = is_finite & valid
                largest = tl.maximum(largest, tl.where(counts, x, float("-inf")))
                smallest = tl.minimum(smallest, tl.where(counts, x, float("inf")))
                x = tl.where(is_finite, x, 0.0)
                signs = tl.where(
                    c < 32,
                    _mix(base + 0x9E3779B9),
                    _mix(base + 0x3C6EF372),
                )
                bit = (signs >> (c & 31).to(tl.uint32)) & 1
                sums_0 += x
                powers_0 += x * x
                buckets += tl.where(bit == 1, x, -x)
            done += general

        # The word that a bucket's elements are added to, by bucket.
        place = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
        at = factors.to(tl.pointer_type(tl.int64)) + (place * size) // 4
        words += tl.sum(tl.sum(checksum, axis=1) * tl.load(at))
        if size == 8:
            words += tl.sum(tl.sum(checksum_high, axis=1) * tl.load(at + 1))
        if value is None:
            top = tl.max(largest)
            bottom = tl.min(smallest)
        else:
            top = tl.maximum(top, tl.max(largest))
            bottom = tl.minimum(bottom, tl.min(smallest))
            total += tl.sum(sums_0.to(tl.float64))
            squares += tl.sum(powers_0.to(tl.float64))
            sketch += tl.reshape(tl.sum(buckets.to(tl.float64), axis=1), [64])
            nan = tl.sum(odd & 0x1FFFFF)
            plus = tl.sum((odd >> 21) & 0x1FFFFF)
            minus = tl.sum((odd >> 42) & 0x1FFFFF)

    elements = tl.where(part == 0, rows * columns, 0)
    target = out + slot * (_ROW * 8)
    if parts == 1:
        _store_row(
            target, top, bottom, total, squares, nan, plus, minus, elements, words,
            sketch,
        )  # fmt: skip
        return
    own = scratch + (partial + part).to(tl.int64) * (_PARTIAL * 8)
    _store_row(
        own, top, bottom, total, squares, nan, plus, minus, elements, words, sketch
    )
    # Who ends last of a group adds its rows up; who ends last of those, the groups'.
    groups = (parts + group - 1) // group
    team = part // group
    first, counter = partial + team * group, team
    count = tl.minimum(parts - team * group, group)
    is_top = groups == 1
    count_at = counters.to(tl.pointer_type(tl.int32)) + partial
    is_waiting = True
    while is_waiting:
        tl.debug_barrier()
        is_waiting = False
        if tl.atomic_add(count_at + counter, 1, sem="acq_rel") == count - 1:
            tl.debug_barrier()
            tl.store(count_at + counter, 0)
            sums = scratch + (partial + parts + team).to(tl.int64) * (_PARTIAL * 8)
            sums = tl.where(is_top, target, sums)
            _add_rows(scratch, first, count, sums, value is not None)
            is_waiting = is_top == 0
            first, counter, count = partial + parts, parts, groups
            is_top = True


class Prepared:
    """Spans of a tensor as the table holds them, but for where tensor and rows are.

    Attributes:
        dtype: Of the elements.
        entries: With offsets for addresses, slots and partial rows from 0.
        count: How many.
        offsets: From the tensor's first element, in bytes.
        shared: Of those with more than one program: its number, programs but one, and
            its first partial row.
        partial_rows: Rows that programs leave for each other.
        room: Entries of the table that it takes.
    """

    __slots__ = (
        "_numbers",
        "count",
        "dtype",
        "entries",
        "offsets",
        "partial_rows",
        "room",
        "shared",
    )

    def __init__(self, dtype: torch.dtype, numbers: npt.NDArray[np.int64]) -> None:
        """Takes entries whose slots and partial rows are not set.

        Args:
            dtype: Of the elements.
            numbers: (count, 8).
        """
        self.dtype, self.count, self.partial_rows = dtype, len(numbers), 0
        self._numbers = numbers
        numbers[:, _SLOT] = np.arange(len(numbers))
        self.offsets = tuple(numbers[:, 0].tolist())
        shared: list[tuple[int, int, int]] = []
        extra = 0
        for number, programs in enumerate((numbers[:, _PROGRAMS] & 65535).tolist()):
            numbers[number, _PROGRAMS] = programs | self.partial_rows << 16
            if programs > 1:
                shared.append((number, programs - 1, self.partial_rows))
                self.partial_rows += programs + -(-programs // _GROUP)
                extra += programs - 1
        self.shared = tuple(shared)
        self.room = self.count + -(-extra // _ENTRY_NUMBERS)
        self.entries = numbers.tobytes()

    def split(self) -> "tuple[Prepared, Prepared]":
        """The first and the second half of the spans."""
        half = self.count // 2
        numbers = self._numbers
        return (
            Prepared(self.dtype, numbers[:half].copy()),
            Prepared(self.dtype, numbers[half:].copy()),
        )

    def move(self, first_indices: Sequence[int]) -> None:
        """The spans stand elsewhere in the whole; none may be waiting for a launch.

        Args:
            first_indices: Index of the first element of each.
        """
        self._numbers[:, _FIRST_INDEX] = first_indices
        self.entries = self._numbers.tobytes()


def prepare(
    dtype: torch.dtype, spans: Sequence[Span], row_stride: int, size: int
) -> Prepared:
    """Works out what does not depend on a tensor's place.

    Args:
        dtype: One that `knows` knows.
        spans: Of a tensor, not empty.
        row_stride: Elements from row to row of the tensor.
        size: Bytes of an element.
    """
    numbers = np.zeros((len(spans), ENTRY_WIDTH), dtype=np.int64)
    for number, span in enumerate(spans):
        offset = (span.first_row * row_stride + span.first_column) * size
        form = collapse(span, row_stride, size)
        programs = _programs_of(form[0] * -(-form[1] // 64), size)
        numbers[number] = (offset, 0, *form, programs)
    return Prepared(dtype, numbers)


def _programs_of(blocks: int, size: int) -> int:
    """How many programs read a span; of the span alone, so that sums are the same."""
    tiles = -(-blocks // _tile_of(size))
    if tiles <= _ALONE_TILES:
        return 1
    return min(-(-tiles // _PART_TILES), MOST_PARTS)


def _tile_of(size: int) -> int:
    return _TILE_BYTES // 64 // max(size, 2)


class Launcher:
    """Starts kernels on one GPU, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        """Keeps what all launches need on the device.

        Args:
            device: The GPU.
        """
        self.device = device
        self._factors = torch.from_numpy(word_factors().view(np.int64)).to(device)
        # What kernels leave for each other, by stream: those of one never overlap.
        self._scratches: dict[int, tuple[Any, ...]] = {}
        self._kernels: dict[Any, Callable[..., None]] = {}
        self.is_gpu = device.type == "cuda"
        self._index = 0
        if self.is_gpu:
            is_named = device.index is not None
            self._index = device.index if is_named else torch.cuda.current_device()
            self._stream_of = triton.runtime.driver.active.get_current_stream

    def launch(
        self,
        dtype: torch.dtype,
        table: int,
        entries: int,
        parts: int,
        programs: int,
        out: int,
        *,
        is_complete: bool = True,
    ) -> None:
        """Measures spans of tensors of one dtype.

        Args:
            dtype: Of the elements; one that `knows` knows.
            table: Address where the GPU reads entries, which must stay there until the
                kernel has ended.
            entries: How many; their partial rows are not more than `SCRATCH_ROWS`.
            parts: Address of an int32 for each program behind one an entry.
            programs: How many there are, one an entry included.
            out: Address on the GPU of rows of 73 float64.
            is_complete: Whether sketch and checksum are wanted.
        """
        stream = 0
        if self.is_gpu:
            stream = self._stream_of(self._index)
        scratch = self._scratches.get(stream) or self._add_scratch(stream)
        key = (dtype, is_complete)
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = _bind(
                _constants(dtype, is_complete=is_complete)
            )
        kernel(programs, stream, table, parts, *scratch[:3], out, entries)

    def _add_scratch(self, stream: int) -> tuple[Any, ...]:
        """Addresses of factors, partial rows and counters, and what keeps them."""
        shape = (SCRATCH_ROWS, _PARTIAL_WIDTH)
        rows = torch.empty(shape, dtype=torch.float64, device=self.device)
        counters = torch.zeros(SCRATCH_ROWS, dtype=torch.int32, device=self.device)
        kept = (self._factors, rows, counters)
        scratch = (*(tensor.data_ptr() for tensor in kept), kept)
        self._scratches[stream] = scratch
        return scratch


class Pending:
    """Spans of tensors of one dtype that the next launch measures.

    They stand in a table in pinned memory, which the kernel reads there. It reads a
    copy on the GPU where a span has many programs: each of them would read from here.
    The table is used in two halves, and a half is written again when the kernels that
    read it have ended.
    """

    def __init__(self, start: Launcher, dtype: torch.dtype) -> None:
        """Makes the table.

        Args:
            start: Of the GPU.
            dtype: Of the elements; one that `knows` knows.
        """
        self._launcher, self._dtype = start, dtype
        size = 2 * _HALF * _ENTRY_BYTES
        with torch.inference_mode(mode=False):  # it is written outside as well
            table = torch.empty(size, dtype=torch.uint8, pin_memory=start.is_gpu)
            copy = torch.empty_like(table, device=start.device)
        self._pinned, self._copy = table, copy
        self._table = memoryview(table.numpy())  # type: ignore[arg-type]
        self._entries = table.numpy().view(np.int64).reshape(-1, ENTRY_WIDTH)
        self._address, self._copy_address = table.data_ptr(), self._copy.data_ptr()
        self._half = 0
        self._events: list[Any] = [None, None]
        # The next entry, and how many are left of the half.
        self._next, self._room = 0, _HALF
        # What the next launch measures: spans, for each tensor its address and the slot
        # of the first, and what they need behind the entries.
        self._waiting: list[Prepared] = []
        self._places: list[int] = []
        self._partial = self._extra_room = 0

    def add(self, address: int, slot: int, spans: Prepared) -> None:
        """Notes spans of a tensor.

        Args:
            address: Of the tensor's first element.
            slot: Row of the first result; the others follow.
            spans: Of the tensor.
        """
        self._waiting.append(spans)
        self._places += (address, slot)
        if spans.shared:
            self._partial += spans.partial_rows
            self._extra_room += spans.room - spans.count

    def launch(self, out: int, *, is_complete: bool = True) -> None:
        """Starts kernels for what was noted: one if the table has room for all.

        Args:
            out: Address on the GPU of rows of 73 float64.
            is_complete: Whether sketch and checksum are wanted.
        """
        waiting, places = self._waiting, self._places
        if not waiting:
            return
        has_shared, room = self._partial > 0, self._extra_room
        fits = self._partial <= SCRATCH_ROWS
        self._waiting, self._places = [], []
        self._partial = self._extra_room = 0
        written = b"".join([spans.entries for spans in waiting])
        count = len(written) // _ENTRY_BYTES
        if fits and count + room > self._room:
            self._turn()
            fits = count + room <= _HALF
        if not fits:
            self._launch_halves(waiting, places, out, is_complete=is_complete)
            return
        first = self._next
        at = first * _ENTRY_BYTES
        self._table[at : at + len(written)] = written
        if len(waiting) <= _FEW:
            self._place_few(waiting, places, at)
        else:
            self._place_many(waiting, places, self._entries[first : first + count])
        end = self._next = first + count
        programs, table = count, self._address
        if has_shared:
            programs += self._write_parts(waiting, first)
            if programs >= _COPIED_PROGRAMS:
                used = slice(at, self._next * _ENTRY_BYTES)
                self._copy[used].copy_(self._pinned[used], non_blocking=True)
                table = self._copy_address
        self._room = (self._half + 1) * _HALF - self._next
        self._launcher.launch(
            self._dtype,
            table + at,
            count,
            table + end * _ENTRY_BYTES,
            programs,
            out,
            is_complete=is_complete,
        )

    def _launch_halves(
        self,
        waiting: list[Prepared],
        places: list[int],
        out: int,
        *,
        is_complete: bool,
    ) -> None:
        """Launches what is too much for one launch half by half."""
        if len(waiting) == 1:
            address, slot = places
            first, second = waiting[0].split()
            halves = [[(address, slot, first)], [(address, slot + first.count, second)]]
        else:
            given = list(zip(places[::2], places[1::2], waiting, strict=True))
            half = len(given) // 2
            halves = [given[:half], given[half:]]
        for tensors in halves:
            for tensor in tensors:
                self.add(*tensor)
            self.launch(out, is_complete=is_complete)

    def _place_few(
        self, waiting: Sequence[Prepared], places: Sequence[int], at: int
    ) -> None:
        """Writes addresses and slots one by one.

        Args:
            waiting: Spans of each tensor.
            places: Address and slot of each.
            at: Byte of the first entry.
        """
        table, pack, number = self._table, _PLACE.pack_into, 0
        for spans in waiting:
            address, slot = places[number], places[number + 1]
            number += 2
            for offset in spans.offsets:
                pack(table, at, address + offset, slot)
                at += _ENTRY_BYTES
                slot += 1

    def _place_many(
        self,
        waiting: Sequence[Prepared],
        places: Sequence[int],
        entries: npt.NDArray[np.int64],
    ) -> None:
        """Adds addresses and slots to entries, all at once."""
        given = np.frombuffer(struct.pack(f"{len(places)}q", *places), np.int64)
        given = given.reshape(-1, 2)
        if len(entries) > len(waiting):
            given = given.repeat([spans.count for spans in waiting], axis=0)
        entries[:, :2] += given

    def _write_parts(self, waiting: Sequence[Prepared], first: int) -> int:
        """Writes what the other programs do behind the entries; returns how many.

        Args:
            waiting: Spans of each tensor.
            first: The first entry.
        """
        table, entry, partial = self._table, 0, 0
        begin = at = self._next * _ENTRY_BYTES
        for spans in waiting:
            for number, extra, own_partial in spans.shared:
                if partial:
                    programs = extra + 1 | partial + own_partial << 16
                    place = (first + entry + number) * _ENTRY_BYTES + 8 * _PROGRAMS
                    _NUMBER.pack_into(table, place, programs)
                parts = _parts_behind(entry + number, extra)
                table[at : at + len(parts)] = parts
                at += len(parts)
            entry += spans.count
            partial += spans.partial_rows
        self._next += -((begin - at) // _ENTRY_BYTES)
        return (at - begin) // 4

    def _turn(self) -> None:
        """Goes on with the table's other half."""
        if self._launcher.is_gpu:
            self._events[self._half] = _recorded()
        half = self._half = 1 - self._half
        event = self._events[half]
        if event is not None:
            event.synchronize()
        self._next, self._room = half * _HALF, _HALF


@functools.lru_cache(4096)
def _parts_behind(entry: int, extra: int) -> bytes:
    """What the programs of an entry do that are not its first."""
    parts = np.arange(1, extra + 1, dtype=np.int32)
    return bytes(parts + (entry << PART_BITS))


def _recorded() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


def _constants(dtype: torch.dtype, *, is_complete: bool) -> dict[str, Any]:
    """The kernel's arguments that it is compiled for."""
    kind = _KINDS[dtype]
    tile, far = _tile_of(kind.size), 4
    if not is_complete:
        tile, far = 2 * tile, 1
    return {
        "bits_type": kind.bits,
        "size": kind.size,
        "value": kind.value,
        "has_ptx": _has_ptx(),
        "is_complete": is_complete,
        "tile": tile,
        "near": 8 * kind.size // far,
        "far": far,
        "general": _GENERAL_TILE,
        "group": _GROUP,
    }


@functools.cache
def _has_ptx() -> bool:
    """Whether kernels may use PTX of compute capability 8.0."""
    if is_interpreted():
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 80


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return not isinstance(_measure_kernel, triton.runtime.JITFunction)


def _bind(constants: dict[str, Any]) -> Callable[..., None]:
    """A function that starts the kernel: programs, stream, then its other arguments.

    Triton's own launcher looks at every argument of every launch. Here all are numbers
    of a known size, so the compiled kernel is kept and started with them.
    """

    def start(programs: int, stream: int, *arguments: int) -> None:
        del stream  # the current one
        _measure_kernel[(programs,)](*arguments, **constants, **options)

    options = {"num_warps": _WARPS}
    if is_interpreted():
        return start
    example = (*[2**40] * 6, 1)
    if _has_ptx():
        options["maxnreg"] = _REGISTERS
    kernel = _measure_kernel.warmup(*example, **constants, **options, grid=(1,))
    if hasattr(kernel, "result"):
        kernel = kernel.result()
    run, values = kernel.run, tuple(constants.values())
    fixed = (kernel.function, kernel.packed_metadata, None, None, None)

    def start_quickly(programs: int, stream: int, *arguments: int) -> None:
        run(programs, 1, 1, stream, *fixed, *arguments, *values)

    return start_quickly


@functools.cache
def launcher(device: torch.device) -> Launcher:
    """The launcher of a GPU."""
    return Launcher(device)


class CudaBackend:
    """Statistics of tensors on a GPU that Triton compiles for."""

    name = "cuda"

    def __init__(self) -> None:
        self._reference = ReferenceBackend()
        self._pending: dict[Any, Pending] = {}

    def measure(
        self, tensor: torch.Tensor, parts: Sequence[Sequence[Span]], rows: records.Row
    ) -> None:
        """See `spec.Backend.measure`."""
        spans = [span for part in parts for span in part if span.rows and span.columns]
        kind = _KINDS.get(tensor.dtype)
        if kind is None or not spans:
            self._reference.measure(tensor, parts, rows)
            return
        tensor = tensor.detach()
        if tensor.is_neg() or as_rows(tensor.shape, tensor.stride()) is None:
            tensor = tensor.resolve_neg().contiguous()
        layout = as_rows(tensor.shape, tensor.stride())
        assert layout is not None
        shape = (len(spans), records.ROW_WIDTH)
        found = torch.empty(shape, dtype=torch.float64, device=tensor.device)
        key = (tensor.device, tensor.dtype)
        pending = self._pending.get(key)
        if pending is None:
            pending = Pending(launcher(tensor.device), tensor.dtype)
            self._pending[key] = pending
        address, out = tensor.data_ptr(), found.data_ptr()
        prepared = prepare(tensor.dtype, spans, layout[1], kind.size)
        pending.add(address, 0, prepared)
        pending.launch(out)
        _add_parts(found.cpu().numpy(), parts, rows, is_float=kind.value is not None)


def knows(dtype: torch.dtype) -> bool:
    """Whether the kernel measures elements of a dtype."""
    return dtype in _KINDS


def _add_parts(
    found: records.Row,
    parts: Sequence[Sequence[Span]],
    rows: records.Row,
    *,
    is_float: bool,
) -> None:
    """Adds the spans of each part up."""
    rows[:] = 0.0
    whole, out = found.view(np.int64), rows.view(np.int64)
    counts = slice(records.NAN, records.CHECKSUM + 1)
    place = 0
    for row, part in enumerate(parts):
        if is_float:
            rows[row, records.MAXIMUM], rows[row, records.MINIMUM] = -np.inf, np.inf
        is_first = True
        for span in part:
            if not span.rows or not span.columns:
                continue
            with np.errstate(over="ignore"):
                out[row, counts] += whole[place, counts]
            rows[row, records.TOTAL : records.NAN] += found[
                place, records.TOTAL : records.NAN
            ]
            rows[row, records.SKETCH :] += found[place, records.SKETCH :]
            source, target = (found, rows) if is_float else (whole, out)
            high, low = (
                source[place, records.MAXIMUM],
                source[place, records.MINIMUM],
            )
            if not is_first or is_float:
                high = max(high, target[row, records.MAXIMUM])
                low = min(low, target[row, records.MINIMUM])
            target[row, records.MAXIMUM], target[row, records.MINIMUM] = high, low
            is_first = False
            place += 1
