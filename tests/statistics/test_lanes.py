# SPDX-License-Identifier: Apache-2.0
"""Blocks as vectors, against numpy, in memory without alignment."""

import hashlib
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pytest_msprobe.statistics import cpu, lanes

numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
floats = arrays.arrays(np.float32, 64, elements=numbers)
# The first example waits for numba.
compiles = settings(deadline=None)
words = arrays.arrays(np.uint32, 64)


def compiled(function, count):
    """A function of lanes that can be called from here."""
    if count == 1:
        return numba.njit("float64(int64)")(lambda a: function(a))
    if count == 2:
        return numba.njit(lambda a, b: function(a, b))
    return numba.njit(lambda a, b, c: function(a, b, c))


widen_bfloat16 = compiled(lanes.widen_bfloat16, 2)
widen_float16 = compiled(lanes.widen_float16, 2)
add_extremes = compiled(lanes.add_extremes, 2)
add_sums = compiled(lanes.add_sums, 2)
give_signs = compiled(lanes.give_signs, 3)
add_groups = compiled(lanes.add_groups, 3)
flush = compiled(lanes.flush, 2)
sum_32_words = compiled(lanes.sum_32_words, 2)
sum_64_words = compiled(lanes.sum_64_words, 2)
sum_lanes = compiled(lanes.sum_lanes, 1)
sum_wide_lanes = compiled(lanes.sum_wide_lanes, 1)
maximum = compiled(lanes.maximum, 1)
minimum = compiled(lanes.minimum, 1)
fold = compiled(lanes.fold, 2)
fold_wide = compiled(lanes.fold_wide, 2)


def test_numba_knows_which_vectors_its_kernels_were_compiled_with():
    """A change of lanes.py changes cpu.py, by whose file compiled kernels are kept."""
    content = Path(lanes.__file__).read_bytes()

    assert hashlib.sha256(content).hexdigest()[:8] == cpu.LANES_SHA256


def unaligned(values):
    """A copy of an array in memory of which the address is odd."""
    raw = np.zeros(values.nbytes + 1, dtype=np.uint8)
    odd = raw[1:] if raw.ctypes.data % 2 == 0 else raw[: values.nbytes]
    found = odd[: values.nbytes].view(values.dtype).reshape(values.shape)
    found[:] = values
    return found


@pytest.mark.parametrize(
    ("dtype", "widen"),
    [(torch.bfloat16, widen_bfloat16), (torch.float16, widen_float16)],
)
def test_all_16_bit_floats_are_widened_as_torch_does(dtype, widen):
    """Every bit pattern becomes torch's float32, subnormals and infinities too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    expected = bits.view(dtype).float().numpy()
    for block in range(0, 2**16, 64):
        source = unaligned(bits[block : block + 64].numpy())
        target = unaligned(np.zeros(64, np.float32))
        widen(source.ctypes.data, target.ctypes.data)
        np.testing.assert_array_equal(target, expected[block : block + 64])


@compiles
@given(x=floats, known=floats)
def test_extremes_and_sums_grow_by_lanes(x, known):
    """Each lane keeps its own maximum, minimum, sum and sum of squares."""
    x = unaligned(x)
    both = unaligned(np.stack([known, known]))
    add_extremes(x.ctypes.data, both.ctypes.data)
    np.testing.assert_array_equal(both, [np.maximum(x, known), np.minimum(x, known)])

    sums = unaligned(np.stack([known, known]))
    add_sums(x.ctypes.data, sums.ctypes.data)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(sums, [known + x, known + x * x])


@compiles
@given(
    x=floats,
    signs=st.integers(0, 2**64 - 1),
    sums=floats,
    turn=st.integers(0, 7),
)
def test_signs_are_given_by_bits_and_groups_change_places(x, signs, sums, turn):
    """Lane i keeps its sign where bit i is 1; group g is added to group g ^ turn."""
    own, target = unaligned(x), unaligned(sums)
    give_signs(own.ctypes.data, signs & 0xFFFFFFFF, signs >> 32)
    is_kept = np.array([signs >> lane & 1 for lane in range(64)])
    np.testing.assert_array_equal(own, np.where(is_kept, x, -x))

    add_groups(own.ctypes.data, target.ctypes.data, turn)
    order = np.arange(64) ^ (8 * turn)
    np.testing.assert_array_equal(target, sums + own[order])


@compiles
@given(x=arrays.arrays(np.float32, (8, 64), elements=st.integers(-1000, 1000)))
def test_rows_are_folded_and_flushed_without_loss(x):
    """Lane i of row k comes to sum i ^ k, from float32 and from float64."""
    lane = np.arange(64)
    expected = 1.0 + sum(x[k, lane ^ k].astype(np.float64) for k in range(8))
    rows, sums = unaligned(x), unaligned(np.ones(64))
    fold(rows.ctypes.data, sums.ctypes.data)
    np.testing.assert_array_equal(sums, expected)

    wide, sums = unaligned(np.zeros((8, 64))), unaligned(np.ones(64))
    for row, target in zip(rows, wide, strict=True):
        flush(row.ctypes.data, target.ctypes.data)
    fold_wide(wide.ctypes.data, sums.ctypes.data)
    np.testing.assert_array_equal(sums, expected)
    assert not rows.any()


@compiles
@given(x=arrays.arrays(np.float32, 64, elements=st.integers(-1000, 1000)))
def test_lanes_become_one_number(x):
    """Sum, maximum and minimum are those of all lanes."""
    own, wide = unaligned(x), unaligned(x.astype(np.float64))
    assert sum_lanes(own.ctypes.data) == x.sum()
    assert sum_wide_lanes(wide.ctypes.data) == x.sum()
    assert (maximum(own.ctypes.data), minimum(own.ctypes.data)) == (x.max(), x.min())


@compiles
@given(x=words, factors=arrays.arrays(np.uint64, 64))
def test_words_are_summed_with_their_factors(x, factors):
    """Products of words and factors are added modulo 2^64."""
    own, theirs = unaligned(x), unaligned(factors)
    for count, summed in ((32, sum_32_words), (64, sum_64_words)):
        products = [int(a) * int(b) for a, b in zip(x, factors, strict=True)]
        expected = sum(products[:count]) % 2**64
        assert summed(own.ctypes.data, theirs.ctypes.data) == expected
