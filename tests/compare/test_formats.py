# SPDX-License-Identifier: Apache-2.0
"""What docs/formats.md says of indices, reproduced in plain Python."""

import plain_formats
import pytest

torch = pytest.importorskip("torch")

from pytest_msprobe.debugger.assemble import assemble  # noqa: E402 - needs torch
from pytest_msprobe.debugger.measure import Measurer, to_value  # noqa: E402
from pytest_msprobe.dump.capture import TensorLine  # noqa: E402
from pytest_msprobe.model.calls import CallRecord, StepRecord  # noqa: E402
from pytest_msprobe.model.segments import (  # noqa: E402
    RequestRows,
    StepLayout,
    split_tokens,
)

WIDTH = 5
# Two requests, the second one at position 2 of its prompt, and one row of padding.
PREFILL = StepLayout(7, 8, (RequestRows(0, 0, 4, 0, 4), RequestRows(1, 4, 3, 2, 9)))
DECODE = StepLayout(2, 2, (RequestRows(0, 0, 1, 4, 4), RequestRows(1, 1, 1, 5, 9)))
POSITIONS = [0, 1, 2, 3, 2, 3, 4, 0]


def checksum(tensor, positions):
    """Checksum with index = position * width + column, rows added up."""
    bits = tensor.view(torch.int32).tolist()
    rows = zip(bits, positions, strict=True)
    sums = (plain_formats.checksum(row, 4, p * WIDTH) for row, p in rows)
    return f"{sum(sums) & plain_formats.M64:016x}"


def lines_of(*steps, dimensions=frozenset()):
    """Tensor lines of one slot over some steps of (layout, tensor)."""
    measurer, refuted, records = Measurer(), set(), []
    for number, (layout, tensor) in enumerate(steps):
        measurer.clear_layout()
        measurer.set_layout(layout.padded_tokens, split_tokens(layout), ())
        measurer.phase = "forward"
        measured = measurer.measure(tensor, refuted, "slot")
        measurer.launch()
        value = to_value(measured, measurer.token_pieces, ())
        name = "Module.m.M.forward.0"
        call = CallRecord(name, name, 0, None, [value], phase="forward")
        records.append(StepRecord(number, layout, [call]))
    lines = assemble(records, dimensions).lines
    return [line for line in lines if isinstance(line, TensorLine)]


def numbers(rows):
    """A tensor with different elements."""
    return torch.arange(rows * WIDTH, dtype=torch.float32).reshape(rows, WIDTH) + 0.5


def test_refuted_tensors_keep_the_index_of_their_pieces():
    """What looked token-major until it was refuted is the sum of its rows' pieces."""
    first, other, late = numbers(8), numbers(6), numbers(2)

    lines = lines_of((PREFILL, first), (DECODE, other), (DECODE, late))

    assert [(line.k, line.g, line.s) for line in lines] == [
        ("n", "", [8, WIDTH]),
        ("n", "", [6, WIDTH]),
        ("n", "", [2, WIDTH]),
    ]
    assert lines[0].c == checksum(first, POSITIONS)
    # The refuting step and all later ones have the flat index.
    assert lines[1].c == checksum(other, range(6))
    assert lines[2].c == checksum(late, range(2))


def test_undecided_tensors_keep_the_index_of_their_pieces():
    """The same holds where the only count seen is a dimension of a parameter."""
    (line,) = lines_of((PREFILL, numbers(8)), dimensions=frozenset({8}))

    assert (line.k, line.g) == ("n", "")
    assert line.c == checksum(numbers(8), POSITIONS)
