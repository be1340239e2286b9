# SPDX-License-Identifier: Apache-2.0
"""Index hash and sketch in numpy, and what can be read from two sketches.

The sketch is a linear random projection: the expected squared distance of two
sketches is the squared distance of the tensors. It sees permutations and swapped
heads, which maxima, means and norms do not.
"""

import base64

import numpy as np
import numpy.typing as npt

from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.records import SKETCH_SIZE

SEED = 0x6D737072
INT16_LIMIT = 32767
# Largest relative error that storing two sketches as 64 int16 each adds to their
# distance: 8 units / sqrt(12) each, a unit being 1/32767 of the norm at the worst (one
# element far above all others); 4e-5 is typical.
STORAGE_FLOOR = 1.5e-4
# Stands for a sum that is no longer finite.
_OVERFLOWN = 64 * float(np.finfo(np.float32).max)

_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_F64 = npt.NDArray[np.float64]


def mix(value: _U32) -> _U32:
    """The 32-bit finaliser, elementwise."""
    h = value ^ (value >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    mixed: _U32 = h ^ (h >> np.uint32(16))
    return mixed


def block_base(block: _U64) -> _U32:
    """Hash of block numbers (index >> 6), elementwise."""
    low = (block & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (block >> np.uint64(32)).astype(np.uint32)
    return mix(low ^ mix(high + np.uint32(SEED)))


def buckets_and_signs(index: _U64) -> tuple[npt.NDArray[np.int64], _F64]:
    """Bucket (0..63) and sign (+1.0, -1.0) of every index.

    Args:
        index: (n,) uint64.

    Returns:
        Two arrays of shape (n,), int64 and float64.
    """
    base = block_base(index >> np.uint64(6))
    column = (index & np.uint64(63)).astype(np.uint32)
    word = np.where(
        column < np.uint32(32),
        mix(base + np.uint32(0x9E3779B9)),
        mix(base + np.uint32(0x3C6EF372)),
    )
    bit = (word >> (column & np.uint32(31))) & np.uint32(1)
    bucket = (column ^ (base >> np.uint32(26))).astype(np.int64)
    return bucket, np.where(bit == 1, 1.0, -1.0)


def sketch(values: npt.ArrayLike, first_index: int = 0) -> _F64:
    """Sketch of consecutive elements.

    Args:
        values: (n,) finite floats.
        first_index: Index of the first one.

    Returns:
        (64,) float64.
    """
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    index = np.arange(flat.size, dtype=np.uint64) + np.uint64(first_index)
    bucket, sign = buckets_and_signs(index)
    sums = np.bincount(bucket, weights=sign * flat, minlength=SKETCH_SIZE)
    return sums.astype(np.float64)


def fold(values: _F64) -> _F64:
    """A sketch with 32 buckets from one with 64: bucket & 31."""
    folded: _F64 = values[..., :32] + values[..., 32:]
    return folded


def _finite(values: _F64) -> _F64:
    """Huge elements (memory that nobody wrote) may overflow the sums of a backend."""
    result: _F64 = np.nan_to_num(values, nan=0.0, posinf=_OVERFLOWN, neginf=-_OVERFLOWN)
    return result


def pack_int16(values: _F64) -> tuple[str, float]:
    """Text and scale of a sketch of a type of at most 16 bits.

    Returns:
        128 bytes (64 little-endian int16) in base 85, and the scale that one unit
        stands for; a sketch of zeros has scale 0.
    """
    values = _finite(values)
    scale = _short_scale(float(np.abs(values).max(initial=0.0)) / INT16_LIMIT)
    if scale == 0.0:
        quantized = np.zeros(SKETCH_SIZE, dtype="<i2")
    else:
        limited = np.clip(np.rint(values / scale), -INT16_LIMIT, INT16_LIMIT)
        quantized = limited.astype("<i2")
    return base64.b85encode(quantized.tobytes()).decode("ascii"), scale


def _short_scale(least: float) -> float:
    """The next number with three digits that is not below `least`: short as text."""
    short = float(f"{least:.2e}")
    if short < least:
        exponent = int(f"{least:.2e}".partition("e")[2])
        short = float(f"{short + 10.0 ** (exponent - 2):.2e}")
    return short


def pack_float32(values: _F64) -> str:
    """Text of a sketch of a wider type: 32 little-endian float32 in base 85."""
    with np.errstate(over="ignore"):
        narrow = fold(_finite(values)).astype("<f4")
    return base64.b85encode(narrow.tobytes()).decode("ascii")


def unpack(text: str, scale: float | None) -> _F64:
    """A stored sketch: 64 values where a scale stands beside it, else 32.

    Raises:
        DumpFormatError: The text is not base 85 of 128 bytes.
    """
    try:
        raw = base64.b85decode(text)
        if scale is None:
            return np.frombuffer(raw, dtype="<f4", count=32).astype(np.float64)
        stored = np.frombuffer(raw, dtype="<i2", count=SKETCH_SIZE)
    except ValueError as error:
        message = f"a sketch of {len(text)} characters cannot be read"
        raise DumpFormatError(message, slug="bad-sketch") from error
    return stored.astype(np.float64) * scale
