# SPDX-License-Identifier: Apache-2.0
"""What a statistics backend computes, and the shape in which it returns it.

A backend reads a tensor once and fills one row of 73 float64 (`model.records`) with the
numbers of a list of spans. docs/formats.md defines hash, sketch and checksum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pytest_msprobe.model.records import Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Some rows of a tensor and where its elements stand in the whole.

    The tensor is seen as rows of its dimension 0 with all other dimensions flattened.
    Element (r, c) of the span is element (first_row + r, first_column + c) of that
    view and has index first_index + r * index_stride + c.

    Attributes:
        first_row: First row of the tensor.
        rows: Number of rows.
        first_column: First column.
        columns: Number of columns.
        first_index: Index of the first element, 0 <= index < 2**63.
        index_stride: Index step from row to row (the unsharded width).
    """

    first_row: int
    rows: int
    first_column: int
    columns: int
    first_index: int
    index_stride: int


class Backend(Protocol):
    """Computes the numbers of spans of tensors."""

    name: str

    def measure(
        self, tensor: "torch.Tensor", parts: Sequence[Sequence[Span]], rows: Row
    ) -> None:
        """Fills one row a part with the numbers of the part's spans together.

        Args:
            tensor: Any dtype, any strides, 0-d included.
            parts: Disjoint parts of the tensor, each a list of spans.
            rows: (len(parts), 73) float64, overwritten.
        """


def whole(shape: Sequence[int]) -> Span:
    """The span of all elements of a tensor of this shape, index row-major."""
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return Span(0, rows, 0, columns, 0, columns)


def rows_of(shape: Sequence[int], first_row: int, rows: int, position: int) -> Span:
    """The span of some rows whose index is position * width + column.

    Args:
        shape: Shape of the tensor, at least one dimension.
        first_row: First row in the tensor.
        rows: Number of rows.
        position: Position in the request of the first row.
    """
    width = 1
    for size in shape[1:]:
        width *= size
    return Span(first_row, rows, 0, width, position * width, width)


def as_rows(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Row length and row stride of a tensor seen as rows of its dimension 0.

    Returns:
        (elements a row, elements from row to row), or None where the dimensions
        behind the first are not contiguous, so that they cannot be seen as one.
    """
    width = 1
    for size, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if size != 1 and stride != width:
            return None
        width *= size
    return width, (strides[0] if shape else 1)


def collapse(span: Span, row_stride: int, size: int) -> tuple[int, int, int, int, int]:
    """Rows, columns, bytes a row, first index, index stride; one long row if it can be.

    Args:
        span: The span.
        row_stride: Elements from row to row in memory.
        size: Bytes of one element.
    """
    if row_stride == span.columns == span.index_stride:
        return 1, span.rows * span.columns, 0, span.first_index, 0
    return (
        span.rows,
        span.columns,
        row_stride * size,
        span.first_index,
        span.index_stride,
    )
