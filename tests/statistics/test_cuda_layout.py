# SPDX-License-Identifier: Apache-2.0
"""What decides, without a GPU, how a tensor is read there."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from pytest_msprobe.statistics.cuda import _has_whole_words, entry_of
from pytest_msprobe.statistics.spec import Span


@pytest.mark.parametrize(
    ("address", "span", "row_stride", "expected"),
    [
        (1024, Span(0, 3, 0, 8, 0, 8), 8, True),  # one long row
        (1024, Span(0, 3, 1, 6, 5, 10), 8, True),  # odd column, odd index
        (1024, Span(0, 3, 1, 6, 4, 10), 8, False),  # odd column, even index
        (1024, Span(0, 3, 0, 6, 0, 10), 7, False),  # rows begin at odd elements
        (1024, Span(0, 3, 0, 6, 0, 9), 8, False),  # indices of rows alternate
        (1026, Span(0, 1, 0, 6, 0, 6), 6, False),  # the tensor itself is shifted
        (1026, Span(0, 1, 0, 6, 7, 6), 6, True),
    ],
)
def test_words_are_read_only_where_even_indices_are_aligned(
    address, span, row_stride, expected
):
    """Two elements make a word if the even one lies at a multiple of 4 bytes."""
    offset, *rest = entry_of(span, row_stride, 2)
    assert _has_whole_words([(address + offset, *rest, 0)]) is expected
