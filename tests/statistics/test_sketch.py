# SPDX-License-Identifier: Apache-2.0
"""Properties of the sketch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import finite

from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.statistics import sketch as module
from pytest_msprobe.statistics.sketch import (
    INT16_LIMIT,
    SKETCH_SIZE,
    STORAGE_FLOOR,
    fold,
    pack_float32,
    pack_int16,
    sketch,
    unpack,
)

vectors = st.lists(finite, min_size=1, max_size=300).map(np.array)
indices = st.integers(0, 2**40)


@given(vectors, indices, st.floats(-8, 8))
def test_sketch_is_linear(values, first, factor):
    """The sketch of a x is a times the sketch of x."""
    left = sketch(values * factor, first)

    assert left == pytest.approx(factor * sketch(values, first), rel=1e-9, abs=1e-6)


@given(vectors, indices, st.data())
def test_sketches_of_pieces_add_up(values, first, data):
    """The sketch of a whole is the sum of those of its pieces."""
    cut = data.draw(st.integers(0, len(values)))

    parts = sketch(values[:cut], first) + sketch(values[cut:], first + cut)

    assert parts == pytest.approx(sketch(values, first), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    "difference",
    [
        pytest.param(lambda g, x: g.standard_normal(x.shape), id="gaussian"),
        pytest.param(
            lambda g, _: np.eye(64)[7] * g.standard_normal((48, 1)), id="column"
        ),
        pytest.param(lambda g, _: np.eye(48)[:, [5]] * g.standard_normal(64), id="row"),
        pytest.param(lambda _, x: np.full(x.shape, 0.3), id="constant"),
        pytest.param(lambda g, x: x[g.permutation(48)] - x, id="permuted rows"),
        pytest.param(
            lambda _, x: np.concatenate([x[:, 32:], x[:, :32]], 1) - x,
            id="swapped heads",
        ),
    ],
)
def test_distance_is_estimated(difference):
    """The distance of two sketches estimates the distance of the tensors."""
    ratios = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((48, 64))
        d = difference(generator, x)
        first = 48 * 64 * seed
        estimate = np.linalg.norm(sketch(x + d, first) - sketch(x, first))
        ratios.append(estimate / np.linalg.norm(d))

    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)
    assert np.std(ratios) < 0.14


@given(vectors, indices)
def test_int16_storage_keeps_its_floor(values, first):
    """A sketch stored as 64 int16 is within the stated floor of the original."""
    exact = sketch(values, first)
    text, scale = pack_int16(exact)

    stored = unpack(text, scale)

    assert len(text) == 160
    error = np.linalg.norm(stored - exact)
    # One unit is at most 1/32767 of the largest sum plus the rounding of the scale.
    assert error <= 8 * 0.5 * scale * 1.001
    assert scale <= 1.01 * np.abs(exact).max() / INT16_LIMIT


def test_storage_floor_is_what_is_stated():
    """Storing two sketches moves their distance by less than the stated floor."""
    errors = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        x = generator.standard_normal(4096)
        x[7] = 100.0 * (seed % 5)
        y = x + 1e-3 * generator.standard_normal(4096)
        exact = sketch(x) - sketch(y)
        stored = unpack(*pack_int16(sketch(x))) - unpack(*pack_int16(sketch(y)))
        errors.append(np.linalg.norm(stored - exact) / np.linalg.norm(x))

    assert max(errors) < STORAGE_FLOOR


@given(vectors, indices)
def test_float32_storage_folds(values, first):
    """A sketch of a wide type is stored as its 32 folded sums in float32."""
    exact = sketch(values, first)

    stored = unpack(pack_float32(exact), None)

    assert stored == pytest.approx(fold(exact), rel=1e-6, abs=1e-6)


def test_zero_sketch_has_scale_zero():
    """The sketch of zeros is stored with scale 0 and read back as zeros."""
    text, scale = pack_int16(np.zeros(64))

    assert scale == 0.0
    assert not unpack(text, scale).any()


@pytest.mark.parametrize("text", ["", "!!!", "abc", "\u00e9" * 160])
def test_damaged_sketch_is_refused(text):
    """A text that is no sketch is an error, not zeros."""
    with pytest.raises(DumpFormatError, match="sketch"):
        unpack(text, 1.0)


@given(st.floats(1e-30, 1e30))
def test_scale_is_short_and_never_too_small(least):
    """The scale has three digits and does not let a sum overflow int16."""
    scale = module._short_scale(least)

    assert least <= scale <= 1.011 * least
    assert len(f"{scale:.2e}") <= 9
    assert float(f"{scale:.2e}") == scale


def test_sums_that_overflow_are_stored():
    """A sketch of huge elements, whose sums are infinite or NaN, has a finite scale."""
    values = np.zeros(SKETCH_SIZE)
    values[:4] = np.inf, -np.inf, np.nan, 1e38

    text, scale = pack_int16(values)

    assert np.isfinite(scale)
    stored = unpack(text, scale)
    assert np.isfinite(stored).all()
    assert stored[0] == -stored[1] > 1e39
    assert stored[2] == 0.0
    assert pack_int16(values) == (text, scale)
    values[32] = -np.inf  # folded onto a sum that is +Inf
    assert unpack(pack_float32(values), None)[0] == 0.0
