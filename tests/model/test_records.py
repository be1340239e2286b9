# SPDX-License-Identifier: Apache-2.0
"""Numbers add up."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.model.dtypes import element_type, is_narrow, is_sketched
from pytest_msprobe.model.records import (
    MAXIMUM,
    ROW_WIDTH,
    Numbers,
    combine,
    read_numbers,
)

counts = st.integers(0, 1000)
values = st.none() | st.floats(-1e6, 1e6)
numbers = st.builds(
    Numbers,
    count=counts,
    maximum=values,
    minimum=values,
    total=st.floats(-1e6, 1e6),
    squares=st.floats(0, 1e6),
    nan=counts,
    positive_inf=counts,
    negative_inf=counts,
    checksum=st.integers(0, 2**64 - 1),
    sketch=st.just(np.arange(64.0)),
)


def as_tuple(item):
    """Everything but the sketch."""
    return tuple(getattr(item, name) for name in Numbers.__slots__ if name != "sketch")


@given(numbers, numbers)
def test_order_of_two_does_not_matter(a, b):
    """Adding is the same both ways."""
    assert as_tuple(combine(a, b)) == as_tuple(combine(b, a))


@given(numbers, numbers)
def test_checksums_wrap_at_64_bits(a, b):
    """Checksums add modulo 2**64, counts add."""
    total = combine(a, b)

    assert total.checksum == (a.checksum + b.checksum) % 2**64
    assert total.nonfinite == a.nonfinite + b.nonfinite


@given(numbers, numbers)
def test_extremes_ignore_what_is_missing(a, b):
    """A side without finite elements does not change maximum and minimum."""
    total = combine(a, b)
    known = [n.maximum for n in (a, b) if n.maximum is not None]

    assert total.maximum == (max(known) if known else None)


def test_empty_row_has_no_extremes():
    """A row that measured nothing has neither maximum nor minimum."""
    found = read_numbers(np.zeros(ROW_WIDTH), "torch.float32")

    assert found.maximum is found.minimum is None
    assert found.count == 0


def test_unsigned_64_bit_extremes_are_exact():
    """The largest uint64 is read back exactly."""
    row = np.zeros(ROW_WIDTH)
    row.view(np.uint64)[MAXIMUM] = 2**64 - 1
    row.view(np.int64)[7] = 1

    assert read_numbers(row, "uint64").maximum == 2**64 - 1


def test_types_by_name():
    """Dtype names are known with and without torch's prefix; unknown ones are bytes."""
    assert element_type("torch.bfloat16").code == "bf16"
    assert is_narrow("float8_e5m2")
    assert not is_narrow("float32")
    assert is_sketched("complex64")
    assert not is_sketched("torch.int64")
    assert element_type("torch.qint8").kind == "int"
