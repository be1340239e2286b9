# SPDX-License-Identifier: Apache-2.0
"""The numbers of one tensor segment, how they are stored, and how two of them add up.

A statistics backend leaves one row of 73 float64 a segment: columns 0 to 8 are named
below (counts and checksum, and the extremes of integer types, as the bits of an
int64), columns 9 to 72 are the sketch.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pytest_msprobe.model.dtypes import element_type

SKETCH_SIZE = 64

MAXIMUM = 0
MINIMUM = 1
TOTAL = 2
SQUARES = 3
NAN = 4
POSITIVE_INF = 5
NEGATIVE_INF = 6
COUNT = 7
CHECKSUM = 8
SKETCH = 9
ROW_WIDTH = SKETCH + SKETCH_SIZE

Row = npt.NDArray[np.float64]
Sketch = npt.NDArray[np.float64]
_CHECKSUM_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Statistics of some elements; those of disjoint sets of elements add up.

    Attributes:
        count: Elements, finite or not.
        maximum: Largest finite element (float types) or element (int, bool); None if
            there is none. Complex elements count by their magnitude.
        minimum: Smallest, likewise.
        total: Sum of the finite elements, None for int and bool types.
        squares: Sum of the squares of the finite elements, None for int and bool.
        nan: Elements that are NaN.
        positive_inf: Elements that are +Inf.
        negative_inf: Elements that are -Inf.
        checksum: Sum over all elements' bits, 64 bit (docs/formats.md).
        sketch: 64 signed sums, float64, or None for int and bool types.
    """

    count: int
    maximum: float | int | None
    minimum: float | int | None
    total: float | None
    squares: float | None
    nan: int
    positive_inf: int
    negative_inf: int
    checksum: int
    sketch: Sketch | None

    @property
    def nonfinite(self) -> int:
        """Elements that are NaN or Inf."""
        return self.nan + self.positive_inf + self.negative_inf


def _larger(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return b if a is None else a
    return max(a, b)


def _smaller(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def combine(a: Numbers, b: Numbers) -> Numbers:
    """Numbers of the union of two disjoint sets of elements of one tensor."""
    sketch = None
    if a.sketch is not None and b.sketch is not None:
        sketch = a.sketch + b.sketch
    return Numbers(
        count=a.count + b.count,
        maximum=_larger(a.maximum, b.maximum),
        minimum=_smaller(a.minimum, b.minimum),
        total=_sum(a.total, b.total),
        squares=_sum(a.squares, b.squares),
        nan=a.nan + b.nan,
        positive_inf=a.positive_inf + b.positive_inf,
        negative_inf=a.negative_inf + b.negative_inf,
        checksum=(a.checksum + b.checksum) & _CHECKSUM_MASK,
        sketch=sketch,
    )


def without_sketch(numbers: Numbers) -> Numbers:
    """The same numbers, sketch dropped."""
    return replace(numbers, sketch=None)


def read_numbers(row: Row, dtype: str) -> Numbers:
    """Turns one filled row into numbers.

    Args:
        row: (73,) float64 as a backend left it.
        dtype: Name of the tensor's element type.
    """
    bits = row.view(np.int64)
    kind = element_type(dtype).kind
    count = int(bits[COUNT])
    nan, plus, minus = (int(bits[i]) for i in (NAN, POSITIVE_INF, NEGATIVE_INF))
    checksum = int(bits[CHECKSUM]) & 0xFFFF_FFFF_FFFF_FFFF
    if kind in ("int", "bool"):
        unsigned = element_type(dtype).name == "uint64"
        source = row.view(np.uint64) if unsigned else bits
        high = int(source[MAXIMUM]) if count else None
        low = int(source[MINIMUM]) if count else None
        return Numbers(count, high, low, None, None, 0, 0, 0, checksum, None)
    finite = count - nan - plus - minus
    return Numbers(
        count=count,
        maximum=float(row[MAXIMUM]) if finite else None,
        minimum=float(row[MINIMUM]) if finite else None,
        total=float(row[TOTAL]),
        squares=float(row[SQUARES]),
        nan=nan,
        positive_inf=plus,
        negative_inf=minus,
        checksum=checksum,
        sketch=row[SKETCH:].copy(),
    )
