# SPDX-License-Identifier: Apache-2.0
# A kernel takes its arguments one by one, is one function, and has numbers of its own.
# Triton reads annotations as code, so kernels have none.
# ruff: noqa: ANN001, ANN202, PLR0912, PLR0913, PLR0915, PLR0917, PLR2004
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The statistics in one pass on a GPU, as two Triton kernels.

The first reads each element once: a program takes blocks of 64 consecutive indices and
leaves partial sums; lane p of a block is the element whose bucket is p, so that sketch
and checksum need no exchange between lanes. The second adds the partial sums of a span
up, always in the same order: equal inputs give equal bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pytest_msprobe.model import records
from pytest_msprobe.statistics.checksum import word_factors
from pytest_msprobe.statistics.reference import ReferenceBackend
from pytest_msprobe.statistics.sketch import SEED
from pytest_msprobe.statistics.spec import Span, as_rows, collapse

# Partial rows are as wide as a power of two.
_WIDTH = 128
# Blocks that a program reads at a time, and how often; fewer than 1024 in all, since
# it counts NaN and infinities in ten bits a lane.
_TILE = 8
_STEPS = 48
# Tensors below so many blocks have a program for each tile.
_FEW_UNITS = 4096
# Spans below so many have one program, whose result is no partial one.
_ONE_PROGRAM_UNITS = 256
# Bytes of the types of which two are read as one word.
_PAIR_BYTES = 2
# Indices below this are in blocks whose numbers have 31 bits.
_LINE_END = 2**37 - 128
# Partial rows that one program adds up.
_GROUP = 32
# Numbers of an entry of the table: address, rows, columns, bytes from row to row, first
# index, index step from row to row, row of the result.
ENTRY_WIDTH = 7
_ENTRY = tl.constexpr(ENTRY_WIDTH)
_SEED = tl.constexpr(SEED)
_PARTIAL = tl.constexpr(_WIDTH)
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

# Type of the bits, bytes, and the float type that they stand for, None for integers.
_KINDS: dict[torch.dtype, tuple[Any, int, Any]] = {
    torch.bfloat16: (tl.int16, 2, tl.bfloat16),
    torch.float16: (tl.int16, 2, tl.float16),
    torch.float32: (tl.int32, 4, tl.float32),
    torch.bool: (tl.int8, 1, None),
    torch.int8: (tl.int8, 1, None),
    torch.uint8: (tl.uint8, 1, None),
    torch.int16: (tl.int16, 2, None),
    torch.int32: (tl.int32, 4, None),
    torch.int64: (tl.int64, 8, None),
}


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _measure_kernel(
    table_address,
    factors,
    floats,
    integers,
    programs,
    width,
    to_slots: tl.constexpr,
    is_again: tl.constexpr,
    bits_type: tl.constexpr,
    size: tl.constexpr,
    float_type: tl.constexpr,
    tile: tl.constexpr,
):
    program, span = tl.program_id(0), tl.program_id(1)
    entry = table_address.to(tl.pointer_type(tl.int64)) + span * _ENTRY
    address, rows, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_bytes, first_index = tl.load(entry + 3), tl.load(entry + 4)
    index_stride = tl.load(entry + 5)
    row_out = (span * programs + program).to(tl.int64) * width
    if to_slots:
        row_out = tl.load(entry + 6) * width
    blocks = (columns + 126) // 64  # of a row, wherever in a block it begins
    units = rows * blocks
    if is_again:
        done = tl.load(floats + row_out + _SQUARES)
        # Nothing to do where the row has a finite sum of squares.
        units = tl.where(done < float("inf"), 0, units)

    p = tl.arange(0, 64)
    checksum = tl.zeros([tile, 64], tl.int64)
    checksum_high = tl.zeros([1, 1], tl.int64)
    if size == 8:
        checksum_high = tl.zeros([tile, 64], tl.int64)
    if float_type is None:
        largest = tl.full([tile, 64], _LEAST, tl.int64)
        smallest = tl.full([tile, 64], _MOST, tl.int64)
    else:
        total = tl.zeros([tile, 64], tl.float32)
        squares = tl.zeros([tile, 64], tl.float32)
        sketch = tl.zeros([tile, 64], tl.float32)
        maximum = tl.full([tile, 64], float("-inf"), tl.float32)
        minimum = tl.full([tile, 64], float("inf"), tl.float32)
        # NaN, +Inf and -Inf seen, ten bits each: a program reads fewer blocks.
        odd = tl.zeros([tile, 64], tl.int32)

    start = program.to(tl.int64) * tile
    while start < units:
        unit = start + tl.arange(0, tile)
        row = unit // blocks
        block = unit - row * blocks
        index = first_index + row * index_stride
        lane = (index & 63).to(tl.int32)
        number = (index >> 6) + block
        base = _mix(
            (number & 0xFFFFFFFF).to(tl.uint32)
            ^ _mix(((number >> 32) + _SEED).to(tl.uint32))
        )
        c = p[None, :] ^ (base >> 26).to(tl.int32)[:, None]
        # Bytes from the unit's first lane; 32 bits are enough within a block.
        left = tl.minimum(columns - block * 64 + lane, 64).to(tl.int32)
        left = tl.where(unit < units, left, 0)
        skip = tl.where(block == 0, lane, 0)
        valid = (c >= skip[:, None]) & (c < left[:, None])
        origin = address + row * row_bytes + (block * 64 - lane) * size
        place = origin[:, None] + c * size
        bits = tl.load(place.to(tl.pointer_type(bits_type)), mask=valid, other=0)

        high_factor = _mix(base + 0xDAA66D2B).to(tl.int64) << 32
        factor = (high_factor + _mix(base + 0x78DDE6E4).to(tl.int64)) | 1
        if size < 4:
            word = (bits.to(tl.uint32, bitcast=False)) & ((1 << (8 * size)) - 1)
            word = word << (8 * ((c * size) & 3)).to(tl.uint32)
            checksum += word.to(tl.int64) * factor[:, None]
        elif size == 4:
            checksum += bits.to(tl.uint32, bitcast=True).to(tl.int64) * factor[:, None]
        else:
            word = bits.to(tl.int64)
            checksum += (word & 0xFFFFFFFF) * factor[:, None]
            checksum_high += ((word >> 32) & 0xFFFFFFFF) * factor[:, None]

        if float_type is None:
            value = bits.to(tl.int64)
            largest = tl.maximum(largest, tl.where(valid, value, _LEAST))
            smallest = tl.minimum(smallest, tl.where(valid, value, _MOST))
        else:
            x = bits.to(float_type, bitcast=True).to(tl.float32)
            finite = tl.abs(x) < float("inf")
            other = tl.where(x > 0, 1 << 10, tl.where(x < 0, 1 << 20, 1))
            odd += tl.where(finite, 0, other)
            counts = finite & valid
            maximum = tl.maximum(maximum, tl.where(counts, x, float("-inf")))
            minimum = tl.minimum(minimum, tl.where(counts, x, float("inf")))
            x = tl.where(finite, x, 0.0)
            signs = tl.where(
                c < 32,
                _mix(base + 0x9E3779B9)[:, None],
                _mix(base + 0x3C6EF372)[:, None],
            )
            bit = (signs >> (c & 31).to(tl.uint32)) & 1
            total += x
            squares += x * x
            sketch += tl.where(bit == 1, x, -x)
        start += programs * tile

    if is_again and units == 0:
        return
    # The word that a bucket's elements are added to, by bucket.
    low = tl.load(factors + (p * size) // 4)
    words = tl.sum(tl.sum(checksum, axis=0) * low)
    if size == 8:
        high = tl.load(factors + p * 2 + 1)
        words += tl.sum(tl.sum(checksum_high, axis=0) * high)
    tl.store(integers + row_out + _CHECKSUM, words)
    count = tl.where(program == 0, rows * columns, 0)
    tl.store(integers + row_out + _COUNT, count)
    if float_type is None:
        tl.store(integers + row_out + _MAXIMUM, tl.max(tl.max(largest, axis=0)))
        tl.store(integers + row_out + _MINIMUM, tl.min(tl.min(smallest, axis=0)))
        zero = tl.zeros([64], tl.float64)
        tl.store(floats + row_out + _SKETCH + p, zero)
        tl.store(floats + row_out + _TOTAL, 0.0)
        tl.store(floats + row_out + _SQUARES, 0.0)
        tl.store(integers + row_out + _NAN, 0)
        tl.store(integers + row_out + _PLUS, 0)
        tl.store(integers + row_out + _MINUS, 0)
    else:
        sums = tl.sum(sketch.to(tl.float64), axis=0)
        tl.store(floats + row_out + _SKETCH + p, sums)
        tl.store(
            floats + row_out + _TOTAL, tl.sum(tl.sum(total.to(tl.float64), axis=0))
        )
        tl.store(
            floats + row_out + _SQUARES, tl.sum(tl.sum(squares.to(tl.float64), axis=0))
        )
        top = tl.max(tl.max(maximum, axis=0)).to(tl.float64)
        bottom = tl.min(tl.min(minimum, axis=0)).to(tl.float64)
        tl.store(floats + row_out + _MAXIMUM, top)
        tl.store(floats + row_out + _MINIMUM, bottom)
        nan = tl.sum(tl.sum((odd & 1023).to(tl.int64), axis=0))
        plus = tl.sum(tl.sum(((odd >> 10) & 1023).to(tl.int64), axis=0))
        minus = tl.sum(tl.sum(((odd >> 20) & 1023).to(tl.int64), axis=0))
        tl.store(integers + row_out + _NAN, nan)
        tl.store(integers + row_out + _PLUS, plus)
        tl.store(integers + row_out + _MINUS, minus)


@triton.jit
def _pairs_kernel(
    table_address,
    factors,
    floats,
    integers,
    programs,
    width,
    to_slots: tl.constexpr,
    is_line: tl.constexpr,
    float_type: tl.constexpr,
    tile: tl.constexpr,
):
    """Two elements of 16 bits at a time, all taken for finite.

    Words must lie at multiples of 4 bytes. Where the sum of squares is not finite the
    row is no result, and the other kernel does it again.
    """
    program, span = tl.program_id(0), tl.program_id(1)
    entry = table_address.to(tl.pointer_type(tl.int64)) + span * _ENTRY
    address, rows, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_bytes, first_index = tl.load(entry + 3), tl.load(entry + 4)
    index_stride = tl.load(entry + 5)
    row_out = (span * programs + program).to(tl.int64) * width
    if to_slots:
        row_out = tl.load(entry + 6) * width
    blocks = (columns + 126) // 64
    units = rows * blocks

    if is_line:
        # One row of indices below 2**38: no division, one word of the block's number.
        units = units.to(tl.int32)
        number_0 = (first_index >> 6).to(tl.int32)
        lane_0 = (first_index & 63).to(tl.int32)
        end = (columns + lane_0).to(tl.int64)
        above = _mix(tl.zeros([tile], tl.uint32) + _SEED)

    q = tl.arange(0, 32)
    checksum = tl.zeros([tile, 32], tl.int64)
    total = tl.zeros([tile, 32], tl.float32)
    squares = tl.zeros([tile, 32], tl.float32)
    even = tl.zeros([tile, 32], tl.float32)
    odd = tl.zeros([tile, 32], tl.float32)
    maximum = tl.full([tile, 32], float("-inf"), tl.float32)
    minimum = tl.full([tile, 32], float("inf"), tl.float32)
    start = program * tile
    if not is_line:
        start = start.to(tl.int64)
    while start < units:
        unit = start + tl.arange(0, tile)
        if is_line:
            base = _mix((number_0 + unit).to(tl.uint32, bitcast=True) ^ above)
            first = unit.to(tl.int64) * 64
            left = tl.minimum(end - first, 64).to(tl.int32)
            skip = tl.where(unit == 0, lane_0, 0)
            origin = address + (first - lane_0) * 2
        else:
            row = unit // blocks
            block = unit - row * blocks
            index = first_index + row * index_stride
            lane = (index & 63).to(tl.int32)
            number = (index >> 6) + block
            base = _mix(
                (number & 0xFFFFFFFF).to(tl.uint32)
                ^ _mix(((number >> 32) + _SEED).to(tl.uint32))
            )
            left = tl.minimum(columns - block * 64 + lane, 64).to(tl.int32)
            skip = tl.where(block == 0, lane, 0)
            origin = address + row * row_bytes + (block * 64 - lane) * 2
        left = tl.where(unit < units, left, 0)
        rotation = (base >> 26).to(tl.int32)
        place = q[None, :] ^ (rotation >> 1)[:, None]
        c = place * 2
        has_low = (c >= skip[:, None]) & (c < left[:, None])
        has_high = (c + 1 >= skip[:, None]) & (c + 1 < left[:, None])
        word = tl.load(
            (origin[:, None] + place * 4).to(tl.pointer_type(tl.int32)),
            mask=has_low | has_high,
            other=0,
        )
        is_inside = (tl.min(left) == 64) & (tl.max(skip) == 0)
        if not is_inside:
            word = tl.where(has_low, word, word & -65536)
            word = tl.where(has_high, word, word & 65535)
        high_factor = _mix(base + 0xDAA66D2B).to(tl.int64) << 32
        factor = (high_factor + _mix(base + 0x78DDE6E4).to(tl.int64)) | 1
        checksum += word.to(tl.uint32, bitcast=True).to(tl.int64) * factor[:, None]
        if float_type == tl.bfloat16:
            low = (word << 16).to(tl.float32, bitcast=True)
            high = (word & -65536).to(tl.float32, bitcast=True)
        else:
            low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
            high = high.to(tl.float32)
        signs = tl.where(
            place < 16,
            _mix(base + 0x9E3779B9)[:, None],
            _mix(base + 0x3C6EF372)[:, None],
        )
        signs = ~(signs >> (c & 31).to(tl.uint32))
        flip_low = ((signs << 31) & 0x80000000).to(tl.int32, bitcast=True)
        flip_high = ((signs << 30) & 0x80000000).to(tl.int32, bitcast=True)
        signed_low = (low.to(tl.int32, bitcast=True) ^ flip_low).to(
            tl.float32, bitcast=True
        )
        signed_high = (high.to(tl.int32, bitcast=True) ^ flip_high).to(
            tl.float32, bitcast=True
        )
        turns = ((rotation & 1) == 1)[:, None]
        even += tl.where(turns, signed_high, signed_low)
        odd += tl.where(turns, signed_low, signed_high)
        total += low + high
        squares += low * low + high * high
        if is_inside:
            maximum = tl.maximum(maximum, tl.maximum(low, high))
            minimum = tl.minimum(minimum, tl.minimum(low, high))
        else:
            maximum = tl.maximum(maximum, tl.where(has_low, low, float("-inf")))
            maximum = tl.maximum(maximum, tl.where(has_high, high, float("-inf")))
            minimum = tl.minimum(minimum, tl.where(has_low, low, float("inf")))
            minimum = tl.minimum(minimum, tl.where(has_high, high, float("inf")))
        start += programs * tile

    words = tl.sum(tl.sum(checksum, axis=0) * tl.load(factors + q))
    tl.store(integers + row_out + _CHECKSUM, words)
    count = tl.where(program == 0, rows * columns, 0)
    tl.store(integers + row_out + _COUNT, count)
    tl.store(integers + row_out + _NAN, 0)
    tl.store(integers + row_out + _PLUS, 0)
    tl.store(integers + row_out + _MINUS, 0)
    sketch = floats + row_out + _SKETCH + q * 2
    tl.store(sketch, tl.sum(even.to(tl.float64), axis=0))
    tl.store(sketch + 1, tl.sum(odd.to(tl.float64), axis=0))
    sums = tl.sum(tl.sum(total.to(tl.float64), axis=0))
    tl.store(floats + row_out + _TOTAL, sums)
    sums = tl.sum(tl.sum(squares.to(tl.float64), axis=0))
    tl.store(floats + row_out + _SQUARES, sums)
    top = tl.max(tl.max(maximum, axis=0)).to(tl.float64)
    bottom = tl.min(tl.min(minimum, axis=0)).to(tl.float64)
    tl.store(floats + row_out + _MAXIMUM, top)
    tl.store(floats + row_out + _MINIMUM, bottom)


@triton.jit
def _combine_kernel(
    table_address,
    floats,
    integers,
    out_floats,
    out_integers,
    programs,
    out_width,
    to_slots: tl.constexpr,
    is_float: tl.constexpr,
    group: tl.constexpr,
):
    part, span = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    column = tl.arange(0, _PARTIAL)
    number = part * group + tl.arange(0, group)
    row = (span * programs + number).to(tl.int64) * _PARTIAL
    inside = (number < programs)[:, None] & (column < _ROW)[None, :]
    place = row[:, None] + column[None, :]
    values = tl.load(floats + place, mask=inside, other=0.0)
    bits = tl.load(integers + place, mask=inside, other=0)
    out = (span * parts + part).to(tl.int64) * out_width
    if to_slots:
        entry = table_address.to(tl.pointer_type(tl.int64)) + span * _ENTRY
        out = tl.load(entry + 6) * out_width
    is_sum = (column == _TOTAL) | (column == _SQUARES) | (column >= _SKETCH)
    is_sum = is_sum & (column < _ROW)
    is_count = (column >= _NAN) & (column <= _CHECKSUM)
    is_high, is_low = column == _MAXIMUM, column == _MINIMUM
    tl.store(out_floats + out + column, tl.sum(values, axis=0), mask=is_sum)
    tl.store(out_integers + out + column, tl.sum(bits, axis=0), mask=is_count)
    if is_float:
        top = tl.max(tl.where(inside, values, float("-inf")), axis=0)
        bottom = tl.min(tl.where(inside, values, float("inf")), axis=0)
        tl.store(out_floats + out + column, top, mask=is_high)
        tl.store(out_floats + out + column, bottom, mask=is_low)
    else:
        largest = tl.max(tl.where(inside, bits, _LEAST), axis=0)
        smallest = tl.min(tl.where(inside, bits, _MOST), axis=0)
        tl.store(out_integers + out + column, largest, mask=is_high)
        tl.store(out_integers + out + column, smallest, mask=is_low)


class CudaBackend:
    """Statistics of tensors on a GPU that Triton compiles for."""

    name = "cuda"

    def __init__(self) -> None:
        self._reference = ReferenceBackend()

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
        entries = [
            (tensor.data_ptr() + offset, *rest, slot)
            for slot, span in enumerate(spans)
            for offset, *rest in (entry_of(span, layout[1], tensor.element_size()),)
        ]
        found = torch.empty(
            (len(spans), records.ROW_WIDTH), dtype=torch.float64, device=tensor.device
        )
        table = torch.tensor(entries, dtype=torch.int64).to(tensor.device)
        run_kernels(entries, table.data_ptr(), tensor.dtype, found)
        _add_parts(found.cpu().numpy(), parts, rows, is_float=kind[2] is not None)


def run_kernels(
    entries: Sequence[Sequence[int]],
    table_address: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """Starts the kernels for spans of tensors of one dtype, without waiting for them.

    Args:
        entries: One a span, `ENTRY_WIDTH` numbers each; none is empty.
        table_address: Of the same numbers (int64) where the GPU reads them, which they
            must not leave before the kernels have ended.
        dtype: Of the elements; one that `knows` knows.
        out: (slots, 73) float64 on the GPU.
    """
    bits_type, size, float_type = _KINDS[dtype]
    units = max(entry[1] * ((entry[2] + 126) // 64) for entry in entries)
    programs = -(-units // (_TILE * (1 if units <= _FEW_UNITS else _STEPS)))
    if units <= _ONE_PROGRAM_UNITS:
        programs = 1
    is_float = float_type is not None
    spans, device = len(entries), out.device
    width = records.ROW_WIDTH if programs == 1 else _WIDTH
    rows = out if programs == 1 else _empty(spans * programs, width, device)
    arguments = (
        table_address,
        _word_factors(device),
        rows,
        rows.view(torch.int64),
        programs,
        width,
        programs == 1,
    )
    is_again = False
    if size == _PAIR_BYTES and is_float and units > _FEW_UNITS:
        is_again = _has_whole_words(entries)
    if is_again:
        _pairs_kernel[(programs, spans)](
            *arguments, _is_line(entries), float_type, _TILE, num_warps=2
        )
    _measure_kernel[(programs, spans)](
        *arguments, is_again, bits_type, size, float_type, _TILE, num_warps=2
    )
    while programs > 1:
        groups = -(-programs // _GROUP)
        is_last = groups == 1
        width = records.ROW_WIDTH if is_last else _WIDTH
        target = out if is_last else _empty(spans * groups, width, device)
        _combine_kernel[(groups, spans)](
            table_address,
            rows,
            rows.view(torch.int64),
            target,
            target.view(torch.int64),
            programs,
            width,
            is_last,
            is_float,
            _GROUP,
            num_warps=4,
        )
        rows, programs = target, groups


def knows(dtype: torch.dtype) -> bool:
    """Whether the kernels measure elements of a dtype."""
    return dtype in _KINDS


@functools.cache
def _word_factors(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(word_factors().view(np.int64)).to(device)


def _has_whole_words(entries: Sequence[Sequence[int]]) -> bool:
    """Whether elements with even index lie at multiples of 4 bytes in every row."""
    for address, rows, _, row_bytes, first_index, index_stride, _ in entries:
        if (address // 2 - first_index) % 2:
            return False
        if rows > 1 and (row_bytes % 4 or index_stride % 2):
            return False
    return True


def _is_line(entries: Sequence[Sequence[int]]) -> bool:
    """Whether every span is one row whose blocks are numbered in 31 bits."""
    return all(entry[1] == 1 and entry[4] + entry[2] < _LINE_END for entry in entries)


def _empty(rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty((rows, width), dtype=torch.float64, device=device)


def entry_of(span: Span, row_stride: int, size: int) -> tuple[int, ...]:
    """An entry without its slot: offset, rows, columns, bytes a row, indices.

    Args:
        span: Of a tensor.
        row_stride: Elements from row to row of the tensor.
        size: Bytes of an element.
    """
    offset = (span.first_row * row_stride + span.first_column) * size
    return offset, *collapse(span, row_stride, size)


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
