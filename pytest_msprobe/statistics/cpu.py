# SPDX-License-Identifier: Apache-2.0
"""Statistics of CPU tensors in one pass over their memory, compiled by numba.

The kernel takes a table of spans by address, releases the GIL and starts no threads.
It walks blocks of 64 elements: the hash is a function of the block, so it is paid once
per 64 elements, and the sketch's xor permutation is split into a permutation of groups
of eight lanes (done at the store) and one inside a group (done once at the end).
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import float64, int64, types, uint32, uint64
from numba.extending import intrinsic

from pytest_msprobe.compat import make_llvmlite_scannable
from pytest_msprobe.model import records
from pytest_msprobe.statistics import lanes
from pytest_msprobe.statistics.checksum import word_factors
from pytest_msprobe.statistics.reference import ReferenceBackend
from pytest_msprobe.statistics.spec import Span, as_rows, collapse

# Columns of the span table.
ADDRESS, ROWS, COLUMNS, ROW_BYTES, FIRST_INDEX, INDEX_STRIDE, ROW, KIND = range(8)
TABLE_WIDTH = 8

BF16, F16, F32, F64, I8, U8, I16, I32, I64, U16, U32, U64 = range(12)
KINDS = {
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.float32: F32,
    torch.float64: F64,
    torch.int8: I8,
    torch.uint8: U8,
    torch.bool: U8,
    torch.int16: I16,
    torch.int32: I32,
    torch.int64: I64,
    torch.uint16: U16,
    torch.uint32: U32,
    torch.uint64: U64,
}
_SIZE = np.array([2, 2, 4, 8, 1, 1, 2, 4, 8, 2, 4, 8], dtype=np.int64)
# From so many elements on a call lets other threads run.
LARGE_ELEMENTS = 1 << 16
SCRATCH_BYTES = 16384
# Sums of a lane stay in float32 for this many blocks, then go into float64; of the
# sketch's, to each of which every eighth block adds, for 8 times as many.
_FLUSH_BLOCKS = 16

# Numba keeps compiled kernels by this file alone: of lanes.py it has to know the hash.
LANES_SHA256 = "84b8c178"

make_llvmlite_scannable()

Table = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float64]

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "boundscheck": False,
}


def _permuted_factors(size: int) -> npt.NDArray[np.uint64]:
    """Row q holds K[j ^ q] for the words j of a block of elements of this size."""
    factors = word_factors()
    words = 16 * size
    step = max(size // 4, 1)
    j = np.arange(words)
    return np.stack([factors[j ^ (q * step)] for q in range(min(words, 64))])


_K1, _K2, _K4, _K8 = (_permuted_factors(size) for size in (1, 2, 4, 8))


def _pointer(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def cast(_context: Any, _address: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], llvm_type.as_pointer())

        return types.CPointer(numba_type)(types.int64), generate

    return cast


_p_u8 = _pointer(types.uint8, ir.IntType(8))
_p_i8 = _pointer(types.int8, ir.IntType(8))
_p_u16 = _pointer(types.uint16, ir.IntType(16))
_p_i16 = _pointer(types.int16, ir.IntType(16))
_p_u32 = _pointer(types.uint32, ir.IntType(32))
_p_i32 = _pointer(types.int32, ir.IntType(32))
_p_u64 = _pointer(types.uint64, ir.IntType(64))
_p_i64 = _pointer(types.int64, ir.IntType(64))
_p_f32 = _pointer(types.float32, ir.FloatType())
_p_f64 = _pointer(types.float64, ir.DoubleType())


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _mix(h: Any) -> Any:
    h = uint32(h ^ (h >> uint32(16)))
    h = uint32(h * uint32(0x7FEB352D))
    h = uint32(h ^ (h >> uint32(15)))
    h = uint32(h * uint32(0x846CA68B))
    return uint32(h ^ (h >> uint32(16)))


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _base(block: Any) -> Any:
    high = _mix(uint32(uint32(block >> uint64(32)) + uint32(0x6D737072)))
    return _mix(uint32(uint32(block) ^ high))


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _block_factor(base: Any) -> Any:
    high = uint64(_mix(uint32(base + uint32(0xDAA66D2B))))
    low = uint64(_mix(uint32(base + uint32(0x78DDE6E4))))
    return uint64(((high << uint64(32)) + low) | uint64(1))


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _block_checksum(address: Any, size: Any, rotation: Any) -> Any:
    """Sum of word * K over the 64 elements at an address."""
    words = numba.carray(_p_u32(address), (256,))
    total = uint64(0)
    if size == 2:
        row = _K2[int64(rotation >> uint32(1))]
        return lanes.sum_32_words(address, row.ctypes.data)
    if size == 4:
        row = _K4[int64(rotation)]
        return lanes.sum_64_words(address, row.ctypes.data)
    if size == 8:
        row = _K8[int64(rotation)]
        for j in range(128):
            total += uint64(words[j]) * row[j]
    else:
        row = _K1[int64(rotation >> uint32(2))]
        for j in range(16):
            total += uint64(words[j]) * row[j]
    return total


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _load_floats(address: Any, kind: Any, x: Any) -> None:
    """64 elements of a type of at most 32 bits as float32."""
    if kind == BF16:
        lanes.widen_bfloat16(address, x.ctypes.data)
    elif kind == F16:
        lanes.widen_float16(address, x.ctypes.data)
    else:
        wide = numba.carray(_p_f32(address), (64,))
        for c in range(64):
            x[c] = wide[c]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _stage(source: Any, count: Any, offset: Any, stage: Any) -> None:
    """Copies bytes into a zeroed block at an offset."""
    data = numba.carray(_p_u8(source), (count,))
    stage[:] = 0
    for k in range(count):
        stage[offset + k] = data[k]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _sanitize(x: Any, first: Any, last: Any, out: Any) -> Any:
    """Counts non-finite lanes and zeroes them; returns how many are finite."""
    bits = out.view(np.int64)
    finite = 0
    for c in range(first, last):
        v = x[c]
        if v != v:
            bits[records.NAN] += 1
        elif v == np.inf:
            bits[records.POSITIVE_INF] += 1
        elif v == -np.inf:
            bits[records.NEGATIVE_INF] += 1
        else:
            finite += 1
            out[records.MAXIMUM] = max(out[records.MAXIMUM], float64(v))
            out[records.MINIMUM] = min(out[records.MINIMUM], float64(v))
            continue
        x[c] = 0
    return finite


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _float_span(span: Any, out: Any, scratch: Any, careful: Any) -> Any:
    """Adds a span of bf16, fp16 or float32; returns False if it met a non-finite one.

    In that case `out` is left as it was and the caller comes again with `careful`.
    """
    start, rows, columns, row_bytes, first_index, index_stride, kind = span
    size = _SIZE[kind]
    stage = numba.carray(_p_u8(scratch), (512,))
    at = scratch + 512
    x = numba.carray(_p_f32(at), (64,))
    # The sketch's sums, 8 times 64, and behind them plain sums and those of squares.
    sums_at, wide_at = scratch + 1024, scratch + 4096
    plain_at, plain_wide_at = sums_at + 8 * 256, wide_at + 8 * 512
    extremes_at = plain_at + 2 * 256
    high = numba.carray(_p_f32(extremes_at), (64,))
    low = numba.carray(_p_f32(extremes_at + 256), (64,))
    sums = numba.carray(_p_f32(sums_at), (640,))
    wide = numba.carray(_p_f64(wide_at), (640,))
    sums[:] = 0
    high[:] = -np.inf
    low[:] = np.inf
    is_wide = False
    checksum = uint64(0)
    pending, signed_pending = 0, 0
    for r in range(rows):
        source = start + r * row_bytes
        index = first_index + r * index_stride
        done = int64(0)
        while done < columns:
            lane = (index + done) & 63
            count = min(64 - lane, columns - done)
            address = source + done * size
            if count < 64:
                _stage(address, count * size, lane * size, stage)
                address = stage.ctypes.data
            _load_floats(address, kind, x)
            base = _base(uint64((index + done) >> 6))
            rotation = uint32(base >> uint32(26))
            checksum += _block_checksum(address, size, rotation) * _block_factor(base)
            if careful:
                _sanitize(x, lane, lane + count, out)
            elif count == 64:
                lanes.add_extremes(at, extremes_at)
            else:
                for c in range(lane, lane + count):
                    high[c] = max(high[c], x[c])
                    low[c] = min(low[c], x[c])
            lanes.add_sums(at, plain_at)
            first = _mix(uint32(base + uint32(0x9E3779B9)))
            second = _mix(uint32(base + uint32(0x3C6EF372)))
            lanes.give_signs(at, int64(first), int64(second))
            inner = int64(rotation & uint32(7))
            lanes.add_groups(at, sums_at + inner * 256, int64(rotation >> uint32(3)))
            pending += 1
            if pending == _FLUSH_BLOCKS or careful:  # sums may be too large
                pending = 0
                if not is_wide:
                    is_wide = True
                    wide[:] = 0
                lanes.flush(plain_at, plain_wide_at)
                lanes.flush(plain_at + 256, plain_wide_at + 512)
                signed_pending += 1
                if signed_pending == 8 or careful:
                    signed_pending = 0
                    for k in range(8):
                        lanes.flush(sums_at + k * 256, wide_at + k * 512)
            done += count
    if is_wide:
        for k in range(10):
            lanes.flush(sums_at + k * 256, wide_at + k * 512)
        total = lanes.sum_wide_lanes(plain_wide_at)
        squares = lanes.sum_wide_lanes(plain_wide_at + 512)
    else:
        total = lanes.sum_lanes(plain_at)
        squares = lanes.sum_lanes(plain_at + 256)
    if not careful:
        if not squares < np.inf:
            return False
        largest = lanes.maximum(extremes_at)
        smallest = lanes.minimum(extremes_at + 256)
        out[records.MAXIMUM] = max(out[records.MAXIMUM], largest)
        out[records.MINIMUM] = min(out[records.MINIMUM], smallest)
    out[records.TOTAL] += total
    out[records.SQUARES] += squares
    sketch_at = out.ctypes.data + 8 * records.SKETCH
    if is_wide:
        lanes.fold_wide(wide_at, sketch_at)
    else:
        lanes.fold(sums_at, sketch_at)
    out.view(np.uint64)[records.CHECKSUM] += checksum
    return True


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _double_span(span: Any, out: Any, scratch: Any) -> None:
    """Adds a span of float64."""
    start, rows, columns, row_bytes, first_index, index_stride, _ = span
    stage = numba.carray(_p_u8(scratch), (512,))
    x = numba.carray(_p_f64(scratch + 512), (64,))
    checksum = uint64(0)
    for r in range(rows):
        source = start + r * row_bytes
        index = first_index + r * index_stride
        done = int64(0)
        while done < columns:
            lane = (index + done) & 63
            count = min(64 - lane, columns - done)
            address = source + done * 8
            if count < 64:
                _stage(address, count * 8, lane * 8, stage)
                address = stage.ctypes.data
            values = numba.carray(_p_f64(address), (64,))
            for c in range(64):
                x[c] = values[c]
            base = _base(uint64((index + done) >> 6))
            rotation = uint32(base >> uint32(26))
            checksum += _block_checksum(address, 8, rotation) * _block_factor(base)
            _sanitize(x, lane, lane + count, out)
            first = _mix(uint32(base + uint32(0x9E3779B9)))
            second = _mix(uint32(base + uint32(0x3C6EF372)))
            for c in range(lane, lane + count):
                out[records.TOTAL] += x[c]
                out[records.SQUARES] += x[c] * x[c]
                signs = first if c < 32 else second
                positive = (signs >> uint32(c & 31)) & uint32(1)
                bucket = records.SKETCH + (c ^ int64(rotation))
                out[bucket] += x[c] if positive else -x[c]
            done += count
    out.view(np.uint64)[records.CHECKSUM] += checksum


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _load_integers(address: Any, kind: Any, x: Any) -> None:
    """64 elements of an integer type as int64 (the bits of a uint64)."""
    if kind == I8:
        i8 = numba.carray(_p_i8(address), (64,))
        for c in range(64):
            x[c] = i8[c]
    elif kind == U8:
        u8 = numba.carray(_p_u8(address), (64,))
        for c in range(64):
            x[c] = u8[c]
    elif kind == I16:
        i16 = numba.carray(_p_i16(address), (64,))
        for c in range(64):
            x[c] = i16[c]
    elif kind == U16:
        u16 = numba.carray(_p_u16(address), (64,))
        for c in range(64):
            x[c] = u16[c]
    elif kind == I32:
        i32 = numba.carray(_p_i32(address), (64,))
        for c in range(64):
            x[c] = i32[c]
    elif kind == U32:
        u32 = numba.carray(_p_u32(address), (64,))
        for c in range(64):
            x[c] = u32[c]
    else:
        i64 = numba.carray(_p_i64(address), (64,))
        for c in range(64):
            x[c] = i64[c]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _integer_span(span: Any, out: Any, scratch: Any) -> None:
    """Adds a span of an integer or boolean type: maximum, minimum, checksum."""
    start, rows, columns, row_bytes, first_index, index_stride, kind = span
    size = _SIZE[kind]
    stage = numba.carray(_p_u8(scratch), (512,))
    x = numba.carray(_p_i64(scratch + 512), (64,))
    bits = out.view(np.int64)
    # Flipping the top bit orders uint64 as int64 does.
    bias = int64(-(2**63)) if kind == U64 else int64(0)
    high = bits[records.MAXIMUM] ^ bias
    low = bits[records.MINIMUM] ^ bias
    if bits[records.COUNT] == 0:
        high, low = int64(-(2**63)), int64(2**63 - 1)
    checksum = uint64(0)
    for r in range(rows):
        source = start + r * row_bytes
        index = first_index + r * index_stride
        done = int64(0)
        while done < columns:
            lane = (index + done) & 63
            count = min(64 - lane, columns - done)
            address = source + done * size
            if count < 64:
                _stage(address, count * size, lane * size, stage)
                address = stage.ctypes.data
            _load_integers(address, kind, x)
            for c in range(lane, lane + count):
                v = x[c] ^ bias
                high = max(high, v)
                low = min(low, v)
            base = _base(uint64((index + done) >> 6))
            rotation = uint32(base >> uint32(26))
            checksum += _block_checksum(address, size, rotation) * _block_factor(base)
            done += count
    bits[records.MAXIMUM] = high ^ bias
    bits[records.MINIMUM] = low ^ bias
    out.view(np.uint64)[records.CHECKSUM] += checksum


def _measure(
    table: Any, count: Any, rows: Any, address: Any, first_row: Any, scratch: Any
) -> None:
    entries = numba.carray(_p_i64(table), (count, 8))
    for k in range(count):
        entry = entries[k]
        row = rows + (first_row + entry[ROW]) * (73 * 8)
        out = numba.carray(_p_f64(row), (73,))
        bits = numba.carray(_p_i64(row), (73,))
        kind = entry[KIND]
        span = (
            entry[ADDRESS] + address,
            entry[ROWS],
            entry[COLUMNS],
            entry[ROW_BYTES],
            entry[FIRST_INDEX],
            entry[INDEX_STRIDE],
            kind,
        )
        elements = entry[ROWS] * entry[COLUMNS]
        if bits[records.COUNT] == 0:
            out[:] = 0.0
            if kind <= F64:
                out[records.MAXIMUM] = -np.inf
                out[records.MINIMUM] = np.inf
        if kind < F64:
            if not _float_span(span, out, scratch, 0):
                _float_span(span, out, scratch, 1)
        elif kind == F64:
            _double_span(span, out, scratch)
        else:
            _integer_span(span, out, scratch)
        bits[records.COUNT] += elements


_SIGNATURE = "void(int64, int64, int64, int64, int64, int64)"
# Takes only integers, because unpacking arrays costs more than a small tensor does.
# Arguments: address of a table of (n, 8) int64 (offset in bytes from the tensor, rows,
# columns, bytes from row to row, first index, index step from row to row, row to add
# to, kind); n; address of rows of 73 float64; address of the tensor's first element;
# number of the first row; address of scratch memory. A row whose count is 0 is started
# afresh, else the spans are added to it.
measure_spans = numba.njit(_SIGNATURE, **{**_OPTIONS, "nogil": False})(_measure)
# The same for large tensors: other threads run meanwhile.
measure_large_spans = numba.njit(_SIGNATURE, **_OPTIONS)(_measure)


BATCH_WIDTH = 5


# Many tensors in one call: an array of (n, 5) int64 with table, spans, rows, tensor and
# first row as above; n; scratch memory.
def _measure_all(batch: Any, count: Any, scratch: Any) -> None:
    items = numba.carray(_p_i64(batch), (count, 5))
    for k in range(count):
        item = items[k]
        measure_spans(item[0], item[1], item[2], item[3], item[4], scratch)


_BATCH_SIGNATURE = "void(int64, int64, int64)"
measure_batch = numba.njit(_BATCH_SIGNATURE, **{**_OPTIONS, "nogil": False})(
    _measure_all
)
measure_large_batch = numba.njit(_BATCH_SIGNATURE, **_OPTIONS)(_measure_all)


class CpuBackend:
    """Statistics of CPU tensors by the compiled kernel; one thread at a time.

    Attributes:
        scratch_address: Memory that the kernel works in.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._reference = ReferenceBackend()
        self._scratch = np.zeros(SCRATCH_BYTES // 8)
        self.scratch_address = self._scratch.ctypes.data

    def measure(
        self, tensor: torch.Tensor, parts: Sequence[Sequence[Span]], rows: Rows
    ) -> None:
        """See `spec.Backend.measure`."""
        kind = KINDS.get(tensor.dtype)
        if kind is None:
            self._reference.measure(tensor, parts, rows)
            return
        if tensor.is_neg() or as_rows(tensor.shape, tensor.stride()) is None:
            tensor = tensor.detach().resolve_neg().contiguous()
        layout = as_rows(tensor.shape, tensor.stride())
        assert layout is not None
        table = build_table(parts, layout[1], tensor.element_size(), kind)
        rows[:] = 0.0
        kernel = (
            measure_spans if tensor.numel() < LARGE_ELEMENTS else measure_large_spans
        )
        kernel(
            table.ctypes.data,
            len(table),
            rows.ctypes.data,
            tensor.data_ptr(),
            0,
            self.scratch_address,
        )


def build_table(
    parts: Sequence[Sequence[Span]], row_stride: int, size: int, kind: int
) -> Table:
    """The kernel's table for the parts of a tensor.

    Args:
        parts: Part i is added to row i.
        row_stride: Elements from row to row of the tensor.
        size: Bytes of an element.
        kind: Kernel's number of the element type.
    """
    entries = [
        (
            (span.first_row * row_stride + span.first_column) * size,
            *collapse(span, row_stride, size),
            row,
            kind,
        )
        for row, spans in enumerate(parts)
        for span in spans
        if span.rows and span.columns
    ]
    return np.array(entries, dtype=np.int64).reshape(-1, TABLE_WIDTH)


def checksum_memory(address: int, count: int, size: int) -> int:
    """Checksum of elements that lie one behind the other in memory.

    Args:
        address: Of the first element.
        count: Number of elements.
        size: Bytes of an element: 1, 2, 4 or 8.

    Returns:
        An integer of 64 bits.
    """
    if count == 0:
        return 0
    rows = np.zeros((1, records.ROW_WIDTH))
    kind = {1: U8, 2: U16, 4: U32, 8: U64}[size]
    table = np.array([[0, 1, count, 0, 0, 0, 0, kind]], dtype=np.int64)
    scratch = np.zeros(SCRATCH_BYTES // 8)
    measure_large_spans(
        table.ctypes.data, 1, rows.ctypes.data, address, 0, scratch.ctypes.data
    )
    return int(rows.view(np.uint64)[0, records.CHECKSUM])
