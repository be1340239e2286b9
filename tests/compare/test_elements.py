# SPDX-License-Identifier: Apache-2.0
"""Saved tensors are compared element by element."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.elements import compare_tensors
from pytest_msprobe.dump.pt import SavedTensor, read_tensor


def bits_of(values, dtype):
    """Values as the bits of a type."""
    if dtype == "bfloat16":
        wide = np.asarray(values, dtype=np.float32).view(np.uint32)
        return (wide >> np.uint32(16)).astype(np.uint16)
    return np.asarray(values, dtype=dtype)


def compared(golden, candidate, dtype="float32", **options):
    """What comes of two arrays."""
    sides = (SavedTensor(dtype, bits_of(side, dtype)) for side in (golden, candidate))
    with ThreadPoolExecutor(2) as pool:
        return compare_tensors(*sides, pool, **options)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.integers(1, 200_000),
    st.integers(0, 2**32 - 1),
)
def test_the_worst_element_and_the_distance_are_found(dtype, size, seed):
    """However many pieces there are, they are those of the whole tensor."""
    generator = np.random.default_rng(seed)
    golden = generator.integers(-8, 8, size) / 4
    candidate = golden.copy()
    place = int(generator.integers(size))
    candidate[place] += 5.0
    candidate[generator.integers(size)] += 0.25

    errors = compared(golden, candidate, dtype)

    assert not errors.is_equal
    assert errors.worst == [place]
    assert errors.largest == np.abs(candidate - golden).max()
    assert errors.squared == pytest.approx(((candidate - golden) ** 2).sum(), rel=1e-6)


def test_the_index_is_one_a_dimension():
    """The worst element of a tensor with several dimensions has several numbers."""
    golden = np.zeros((3, 4, 5))
    candidate = golden.copy()
    candidate[2, 1, 3] = 1.0

    assert compared(golden, candidate).worst == [2, 1, 3]
    assert compared(golden, golden).is_equal


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_nan_and_infinity_hide_nothing(special, dtype):
    """The same ones at the same places are equal; others differ infinitely."""
    golden = np.arange(8.0)
    golden[3] = special
    moved, other = golden.copy(), golden.copy()
    moved[[3, 4]] = moved[[4, 3]]
    other[6] += 2.0

    assert compared(golden, golden, dtype).is_equal
    assert np.isinf(compared(golden, moved, dtype).squared)
    assert compared(golden, moved, dtype).worst in ([3], [4])
    found = compared(golden, other, dtype)
    assert (found.squared, found.worst) == (4.0, [6])


def test_other_shapes_and_types_are_not_compared():
    """Element by element there is nothing to say where shapes or dtypes differ."""
    assert compared(np.zeros(3), np.zeros(4)) is None
    a, b = SavedTensor("float32", np.zeros(3)), SavedTensor("float64", np.zeros(3))
    with ThreadPoolExecutor(1) as pool:
        assert compare_tensors(a, b, pool) is None


def test_msprobes_metrics_are_those_of_its_formulas():
    """Dot product, squares, relative error and shares of small relative errors."""
    golden = np.array([1.0, 2.0, 0.0, -4.0])
    candidate = np.array([1.0, 2.004, 0.0, -4.4])

    found = compared(golden, candidate, "float64", is_full=True)

    assert found.dot == pytest.approx((golden * candidate).sum())
    assert found.squares == pytest.approx(((golden**2).sum(), (candidate**2).sum()))
    assert found.relative == pytest.approx(0.1)
    assert found.shares == (0.5, 0.75)


def test_every_half_is_read_exactly():
    """All 65536 bit patterns of float16, subnormal ones too, have their values."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))].view(np.float16)
    zero = np.zeros(len(finite), np.float16)

    for first in range(0, len(finite), 4096):
        part = slice(first, first + 4096)
        errors = compared(zero[part], finite[part], "float16")
        wide = finite[part].astype(np.float64)
        assert errors.largest == np.abs(wide).max()
        assert errors.squared == pytest.approx((wide**2).sum(), rel=1e-5)


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Files are mapped and compared in pieces: 64 MiB of them take a few MiB."""
    torch = pytest.importorskip("torch")
    sides = [torch.zeros(4096, 4096, dtype=torch.bfloat16) for _ in range(2)]
    sides[1][4000, 17] = 1.0
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    for side, path in zip(sides, paths, strict=True):
        torch.save(side, path)
    del sides

    tracemalloc.start()
    with ThreadPoolExecutor(2) as pool:
        errors = compare_tensors(*map(read_tensor, paths), pool)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert errors.worst == [4000, 17]
    assert peak < 8 << 20
