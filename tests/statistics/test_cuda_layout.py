# SPDX-License-Identifier: Apache-2.0
"""What decides, without a GPU, how a tensor is read there."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from pytest_msprobe.statistics.cuda import MOST_PARTS, SCRATCH_ROWS, form_of
from pytest_msprobe.statistics.spec import Span


@pytest.mark.parametrize(
    ("span", "row_stride", "offset"),
    [
        (Span(0, 3, 0, 8, 0, 8), 8, 0),
        (Span(0, 3, 1, 6, 5, 10), 8, 2),
        (Span(2, 3, 1, 6, 5, 10), 8, 34),
    ],
)
def test_a_form_knows_where_its_span_begins(span, row_stride, offset):
    """The offset is that of the first row and column, in bytes."""
    assert form_of(span, row_stride, 2).offset == offset


@pytest.mark.parametrize("elements", [1, 2**15, 2**18, 2**22, 2**30])
def test_programs_are_as_many_as_the_span_is_large(elements):
    """A small span has one program, and none has more than a launch has room for."""
    form = form_of(Span(0, 1, 0, elements, 0, elements), elements, 2)

    assert (form.parts == 1) == (elements <= 2**15)
    assert form.parts <= MOST_PARTS
    assert form.partial_rows <= SCRATCH_ROWS // 8
    assert (form.partial_rows == 0) == (form.parts == 1)


def test_a_span_has_as_many_programs_whatever_its_rows_are_called():
    """Sums do not depend on where in a request the rows of a span stand."""
    forms = [
        form_of(Span(0, 300, 0, 896, 896 * position, 896), 896, 2)
        for position in (0, 5, 1000)
    ]

    assert len({form.parts for form in forms}) == 1
