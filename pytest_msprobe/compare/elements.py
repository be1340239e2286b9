# SPDX-License-Identifier: Apache-2.0
"""Compares saved tensors element by element, in pieces, in all cores, without torch.

Pieces stay in a core's cache, and files are mapped: memory does not grow with tensors.
"""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.errors import Elements
from pytest_msprobe.compare.match import Pairs
from pytest_msprobe.dump.capture import CaptureFile
from pytest_msprobe.dump.pt import SavedTensor, read_tensor

_PIECE = 1 << 16
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_THOUSANDTHS = (1e-3, 5e-3)


@dataclass(slots=True)
class ElementErrors:
    """Differences of two tensors of equal shape, candidate less golden.

    Attributes:
        is_equal: Whether all bits are equal.
        squared: Sum of the squared differences; infinite where NaN or infinities stand
            at other places. At the same places they count as equal.
        largest: Greatest absolute difference, likewise.
        worst: Index of the element with it, None where all are equal.
        dot: Sum of the products of both.
        squares: Sum of squares of golden and candidate.
        relative: Greatest relative difference; computed on request.
        shares: Shares of elements with a relative difference below 0.001 and 0.005,
            likewise.
    """

    is_equal: bool
    squared: float = 0.0
    largest: float = 0.0
    worst: list[int] | None = None
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    relative: float = 0.0
    shares: tuple[float, float] = (1.0, 1.0)


class _Scratch(threading.local):
    """Arrays of a thread that its pieces share: new ones would cost more than sums."""

    def __init__(self) -> None:
        self.sides = [np.empty(_PIECE, np.uint32) for _ in range(2)]
        self.signs = np.empty(_PIECE, np.uint32)
        self.difference = np.empty(_PIECE, np.float32)
        self.magnitude = np.empty(_PIECE, np.float32)


_SCRATCH = _Scratch()
# A half's bits, moved to where a single's are, are too small by this factor.
_HALF_BIAS = np.float32(2.0**112)
_HALF_INFINITY = 0x7C00


def _values(bits: npt.NDArray[Any], dtype: str, side: int) -> npt.NDArray[Any]:
    """Elements as floats: float32, or float64 for wider types and integers."""
    wide = _SCRATCH.sides[side][: len(bits)]
    if dtype == "bfloat16":
        np.copyto(wide, bits)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    if dtype == "float16":
        return _halves(bits, wide)
    if dtype == "float32":
        return bits
    return bits.astype(np.float64, copy=False)


def _halves(
    bits: npt.NDArray[Any], wide: npt.NDArray[np.uint32]
) -> npt.NDArray[np.float32]:
    """float16 as float32, by integers: numpy converts one element after another."""
    signs = _SCRATCH.signs[: len(bits)]
    np.copyto(signs, bits.view(np.uint16))
    np.bitwise_and(signs, 0x7FFF, out=wide)
    if wide.max() >= _HALF_INFINITY:
        return bits.astype(np.float32)
    np.left_shift(wide, 13, out=wide)
    values = wide.view(np.float32)
    np.multiply(values, _HALF_BIAS, out=values)
    np.bitwise_and(signs, 0x8000, out=signs)
    np.left_shift(signs, 16, out=signs)
    np.bitwise_or(wide, signs, out=wide)
    return values


def _dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Sum of products, in this thread: a BLAS would start threads of its own."""
    return float(np.einsum("i,i->", a, b))


def _piece(
    golden: npt.NDArray[Any], candidate: npt.NDArray[Any], dtype: str, *, is_full: bool
) -> tuple[ElementErrors, int]:
    """Differences of one piece, and the place of the greatest one in it."""
    is_equal = golden.tobytes() == candidate.tobytes()
    if is_equal and not is_full:
        return ElementErrors(is_equal=True), 0
    a, b = _values(candidate, dtype, 0), _values(golden, dtype, 1)
    difference = _SCRATCH.difference[: len(a)]
    magnitude = _SCRATCH.magnitude[: len(a)]
    if a.dtype != np.float32:
        difference, magnitude = np.empty_like(a), np.empty_like(a)
    with np.errstate(all="ignore"):
        np.subtract(a, b, out=difference)
        squared = _dot(difference, difference)
        if not math.isfinite(squared):
            a, b, difference = _without_common(a, b)
            # Wide enough for the squares of float32.
            wide = difference.astype(np.float64)
            squared = _dot(wide, wide)
        np.abs(difference, out=magnitude)
        place = int(magnitude.argmax())
        result = ElementErrors(is_equal, squared, float(magnitude[place]))
        if is_full:
            _add_ratios(result, a, b, magnitude)
    return result, place


def _without_common(
    a: npt.NDArray[Any], b: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Both with 0 where they hold the same NaN or infinity, and their difference."""
    same = (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))
    a, b = np.where(same, 0, a), np.where(same, 0, b)
    difference = a - b
    difference[np.isnan(difference)] = np.inf
    return a, b, difference


def _add_ratios(
    result: ElementErrors,
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    magnitude: npt.NDArray[Any],
) -> None:
    """Relative differences; where the golden is 0, epsilon is added to both."""
    epsilon = np.finfo(b.dtype).eps
    ratio = magnitude / np.where(b == 0, epsilon, np.abs(b))
    result.relative = float(ratio.max())
    low, high = (int(np.count_nonzero(ratio < limit)) for limit in _THOUSANDTHS)
    result.shares = (low, high)
    wide = a.astype(np.float64), b.astype(np.float64)
    result.dot = _dot(*wide)
    result.squares = (_dot(wide[1], wide[1]), _dot(wide[0], wide[0]))


def compare_tensors(
    golden: SavedTensor,
    candidate: SavedTensor,
    pool: ThreadPoolExecutor,
    *,
    is_full: bool = False,
) -> ElementErrors | None:
    """Compares two tensors.

    Args:
        golden: The golden.
        candidate: The candidate.
        pool: Threads.
        is_full: Whether dot products, ratios and shares are wanted as well.

    Returns:
        None where shape or dtype differ, or the dtype has no numbers and bits differ.
    """
    if golden.bits.shape != candidate.bits.shape or golden.dtype != candidate.dtype:
        return None
    old, new = (np.reshape(side.bits, -1) for side in (golden, candidate))
    is_number = golden.dtype in _FLOATS or old.dtype.kind in "iu"
    if not is_number or golden.dtype.startswith("float8"):
        return ElementErrors(is_equal=True) if np.array_equal(old, new) else None
    if not len(old):
        return ElementErrors(is_equal=True)
    starts = range(0, len(old), _PIECE)
    pieces = pool.map(
        lambda first: _piece(
            old[first : first + _PIECE],
            new[first : first + _PIECE],
            golden.dtype,
            is_full=is_full,
        ),
        starts,
    )
    return _sum(list(zip(starts, pieces, strict=True)), golden.bits.shape)


def _sum(
    pieces: list[tuple[int, tuple[ElementErrors, int]]], shape: tuple[int, ...]
) -> ElementErrors:
    found = [errors for _, (errors, _) in pieces]
    first, (worst, place) = max(pieces, key=lambda piece: piece[1][0].largest)
    size = math.prod(shape)
    element = None
    if worst.largest > 0:
        index = np.unravel_index(first + place, shape)
        element = [int(number) for number in index]
    return ElementErrors(
        is_equal=all(errors.is_equal for errors in found),
        squared=math.fsum(errors.squared for errors in found),
        largest=worst.largest,
        worst=element,
        dot=math.fsum(errors.dot for errors in found),
        squares=(
            math.fsum(errors.squares[0] for errors in found),
            math.fsum(errors.squares[1] for errors in found),
        ),
        relative=max(errors.relative for errors in found),
        shares=(
            sum(errors.shares[0] for errors in found) / size,
            sum(errors.shares[1] for errors in found) / size,
        ),
    )


def threads() -> int:
    """Threads to compare with: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def measure_files(
    golden: CaptureFile, candidate: CaptureFile, pairs: Pairs
) -> Elements:
    """Compares the saved tensors of all pairs that have them on both sides.

    Args:
        golden: The golden, with its files.
        candidate: The candidate, with its.
        pairs: Their rows; `is_equal` becomes what the bits say.
    """
    size = len(pairs.new)
    result = Elements(np.full(size, np.nan), [None] * size)
    lines = pairs.line_pairs(np.arange(size))
    with ThreadPoolExecutor(threads()) as pool:
        for i, (old, new) in enumerate(zip(*lines, strict=True)):
            files = golden.files.get(old.t), candidate.files.get(new.t)
            errors = _compare_files(*files, pool)
            if errors is None:
                continue
            pairs.is_equal[i] = errors.is_equal
            result.distance[i] = math.sqrt(errors.squared)
            result.worst[i] = errors.worst
    return result


def _compare_files(
    golden: Path | None, candidate: Path | None, pool: ThreadPoolExecutor
) -> ElementErrors | None:
    if golden is None or candidate is None:
        return None
    return compare_tensors(read_tensor(golden), read_tensor(candidate), pool)
