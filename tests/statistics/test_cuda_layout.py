# SPDX-License-Identifier: Apache-2.0
"""What decides, without a GPU, how a tensor is read there."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from pytest_msprobe.statistics.cuda import (
    ENTRY_WIDTH,
    MOST_PARTS,
    SCRATCH_ROWS,
    prepare,
)
from pytest_msprobe.statistics.spec import Span, rows_of


def entries_of(prepared):
    """Offset, number, rows, columns, row bytes, first index, index step, programs."""
    return np.frombuffer(prepared.entries, np.int64).reshape(-1, ENTRY_WIDTH)


def bf16(spans, row_stride):
    """Spans of a bfloat16 tensor."""
    return prepare(torch.bfloat16, spans, row_stride, 2)


@pytest.mark.parametrize(
    ("span", "row_stride", "offset"),
    [
        (Span(0, 3, 0, 8, 0, 8), 8, 0),
        (Span(0, 3, 1, 6, 5, 10), 8, 2),
        (Span(2, 3, 1, 6, 5, 10), 8, 34),
    ],
)
def test_an_entry_knows_where_its_span_begins(span, row_stride, offset):
    """The offset is that of the first row and column, in bytes."""
    assert entries_of(bf16([span], row_stride))[0, 0] == offset


@pytest.mark.parametrize("elements", [1, 2**15, 2**18, 2**22, 2**30])
def test_programs_are_as_many_as_the_span_is_large(elements):
    """A small span has one program, and none has more than a launch has room for."""
    span = Span(0, 1, 0, elements, 0, elements)
    prepared = bf16([span], elements)
    programs = entries_of(prepared)[0, 7] & 65535

    assert (programs == 1) == (elements <= 2**15)
    assert programs <= MOST_PARTS
    assert prepared.partial_rows <= SCRATCH_ROWS // 8
    assert (prepared.partial_rows == 0) == (programs == 1)
    assert prepared.shared == (((0, programs - 1, 0),) if programs > 1 else ())


def test_a_span_has_as_many_programs_whatever_its_rows_are_called():
    """Sums do not depend on where in a request the rows of a span stand."""
    forms = [
        bf16([Span(0, 300, 0, 896, 896 * position, 896)], 896)
        for position in (0, 5, 1000)
    ]

    assert len({form.shared for form in forms}) == 1


def test_spans_that_move_are_those_made_for_the_new_place():
    """Only the first indices change when the rows of spans are called otherwise."""
    shape = (300, 896)
    prepared = bf16([rows_of(shape, 0, 1, 4), rows_of(shape, 1, 299, 5)], 896)

    prepared.move([7 * 896, 8 * 896])

    there = bf16([rows_of(shape, 0, 1, 7), rows_of(shape, 1, 299, 8)], 896)
    assert prepared.entries == there.entries


def test_spans_that_no_launch_has_room_for_are_split():
    """The halves of many large spans are the same spans, each with rows of its own."""
    rows, width = 8000, 4096
    spans = [rows_of((rows, width), row, 100, row) for row in range(0, rows, 100)]
    prepared = bf16(spans, width)
    assert prepared.partial_rows < SCRATCH_ROWS
    many = bf16(spans * 8, width)
    assert many.partial_rows > SCRATCH_ROWS

    first, second = many.split()

    assert first.count + second.count == many.count == 640
    assert first.partial_rows + second.partial_rows == many.partial_rows
    halves = [entries_of(first), entries_of(second)]
    assert [list(half[:, 1]) for half in halves] == [list(range(320))] * 2
    kept = [0, 2, 3, 4, 5, 6]
    assert (np.concatenate(halves)[:, kept] == entries_of(many)[:, kept]).all()
    assert halves[1][0, 7] >> 16 == 0
