# SPDX-License-Identifier: Apache-2.0
"""Rows as columns: the same numbers as row by row, and quicker."""

import base64
import math
import time

import captures
import numpy as np
import pytest
from captures import capture, module
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.errors import Errors
from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.match import pair_rows
from pytest_msprobe.compare.sketches import decode, distances
from pytest_msprobe.compare.tolerance import default_limits, resolve_limits
from pytest_msprobe.dump.capture import CallLine
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.limits import ROW_METRICS
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR, fold, unpack

LIMITS = default_limits("same", "bfloat16")


def relative(difference, scale):
    """Difference / scale as the metrics define it."""
    if math.isnan(difference) or math.isnan(scale):
        return math.inf
    if scale > 0:
        return difference / scale
    return 0.0 if difference == 0 else math.inf


def distance(old, new):
    """The L2 distance of two rows, from their sketches or single elements."""
    if not old.q or not new.q:
        a, b = old.v[0], new.v[0]
        if math.prod(old.s) != 1 or (a is None) != (b is None):
            return math.nan
        return 0.0 if a is None else abs(a - b)
    a, b = unpack(old.q, old.a), unpack(new.q, new.a)
    size = min(len(a), len(b))
    a, b = (fold(x) if len(x) > size else x for x in (a, b))
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def errors_of(old, new):
    """All errors of one row of a float type."""
    count, squares = math.prod(old.s), (old.v[3], new.v[3])
    norms = [math.sqrt(value) for value in squares]
    known = [abs(value) for value in old.v[:2] if value is not None]
    largest = max(known, default=math.nan)

    def extreme(place):
        a, b = old.v[place], new.v[place]
        if a is None and b is None:
            return 0.0
        both = a is not None and b is not None
        return relative(abs(a - b) if both else math.nan, largest)

    means = [line.v[2] / count for line in (old, new)]
    return {
        "rel_l2": relative(distance(old, new), norms[0]),
        "max": extreme(0),
        "min": extreme(1),
        "norm": relative(abs(norms[0] - norms[1]), norms[0]),
        "mean": relative(abs(means[0] - means[1]), math.sqrt(squares[0] / count)),
    }


def definition(old, new):
    """Ratio and relative distance of one row, without any column."""
    if (old.c, old.d, old.s) == (new.c, new.d, new.s):
        return 0.0, 0.0
    if (old.d, old.s, old.x) != (new.d, new.s, new.x) or len(old.v) == 2:
        return math.inf, None
    errors = errors_of(old, new)
    ratios = []
    for metric, error in errors.items():
        limit = LIMITS[metric]
        if metric == "rel_l2" and (old.a is not None or new.a is not None):
            limit += STORAGE_FLOOR
        ratios.append(error / limit)
    return max(ratios), errors["rel_l2"]


def network_of(lines):
    """A capture with one module for each tensor line."""
    result = capture([])
    for number, line in enumerate(lines):
        result.tensors[number] = line
        name = module("m", number=number)
        result.entries.append(CallLine(name, 0, {}, {"output.0": [number]}))
    return result


SHAPES = [(2, 8), (8, 2), (1, 1), (3, 33)]
PLACES = [("0.prompt", "t"), ("0.prompt", "s"), ("", "n")]


@st.composite
def line_pairs(draw):
    """Two tensor lines of the same slot, by seeds: any type, shape and difference."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(SHAPES))
    segment, kind = draw(st.sampled_from(PLACES))
    values = rng.standard_normal(shape) * draw(st.sampled_from([0, 1e-30, 1, 1e4]))
    change = draw(st.sampled_from(["equal", "scale", "noise", "nan", "shape", "int"]))
    other = values.copy()
    if change == "scale":
        other = values * (1 + draw(st.sampled_from([1e-6, 1e-3, 0.5])))
    elif change == "noise":
        other = values + rng.standard_normal(shape) * 1e-3
    elif change == "nan":
        other.flat[0] = draw(st.sampled_from([math.nan, math.inf]))
    elif change == "shape":
        other = values.T
    elif change == "int":
        other = rng.integers(0, 9, shape)
        values = other if draw(st.booleans()) else values
    if draw(st.booleans()):
        values.flat[-1] = other.flat[-1] = 0 if change == "int" else math.nan
    lines = []
    for array in (values, other):
        line = captures.tensor_line(0, array, segment=segment, kind=kind)
        if array.size == 1:
            line.q, line.a = "", None
        lines.append(line)
    return lines


@settings(max_examples=60, deadline=None)
@given(st.lists(line_pairs(), min_size=1, max_size=12))
def test_columns_equal_the_definition_row_by_row(pairs):
    """Whatever stands beside it, a row has the ratio that it has alone."""
    old, new = zip(*pairs, strict=True)
    paired = pair_rows(network_of(old), network_of(new))
    limits = resolve_limits(paired.candidate.names(paired.new), [], LIMITS, "same")

    errors = Errors(paired, limits, np.ones(len(pairs), dtype=np.bool_))

    assert len(paired.new) == len(pairs)
    for i, pair in enumerate(pairs):
        ratio, rel_l2 = definition(*pair)
        assert errors.ratio[i] == pytest.approx(ratio, rel=1e-12)
        assert (errors.rel_l2[i] > 0) or not math.isinf(ratio)
        if rel_l2 is not None:
            assert errors.rel_l2[i] == pytest.approx(rel_l2, rel=1e-12)
        if errors.ratio[i] not in (0.0, math.inf):
            finding = errors.finding(i)
            assert finding.metric in ROW_METRICS
            assert finding.observed / finding.allowed == pytest.approx(finding.ratio)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.booleans())
def test_sketches_are_decoded_as_they_were_stored(seed, count, is_wide):
    """Decoding in bulk gives what decoding each alone gives."""
    rng = np.random.default_rng(seed)
    texts = [base64.b85encode(rng.bytes(128)).decode("ascii") for _ in range(count)]
    scales = None if is_wide else rng.random(count)

    with np.errstate(invalid="ignore"):  # random bytes are signalling NaNs as well
        found = decode(texts, scales)
        units = [None] * count if is_wide else list(scales)
        alone = [unpack(text, unit) for text, unit in zip(texts, units, strict=True)]

    assert np.array_equal(found, np.array(alone), equal_nan=True)


@pytest.mark.parametrize(
    "damage", ["~" * 160, " " * 160, "0" * 150, "ä" + "0" * 159, "0"]
)
def test_damaged_sketches_are_refused(damage):
    """A text that is no sketch is an error wherever it stands, never a number."""
    good = base64.b85encode(bytes(128)).decode("ascii")

    with pytest.raises(DumpFormatError, match="cannot be read"):
        decode([good, damage, good], np.ones(3))


def test_wide_sketches_are_folded_against_narrow_ones():
    """A sketch of 64 buckets is compared with one of 32 in the 32 that both have."""
    x = np.random.default_rng(0).standard_normal((4, 16))
    narrow = captures.tensor_line(0, x)
    wide = captures.tensor_line(0, x * 1.5, kind="n")

    found = distances(
        [narrow.q, wide.q], [wide.q, narrow.q], *np.array([[narrow.a, np.nan],
                                                           [np.nan, narrow.a]])
    )  # fmt: skip

    assert found == pytest.approx(distance(narrow, wide), rel=1e-12)


def test_pairs_stand_in_the_candidates_order():
    """Rows are paired by what they are, and keep the order of their execution."""
    golden, candidate = captures.Network().run(), captures.Network().run()
    calls = golden.entries[1:]
    golden.entries[1:] = [calls[4], *calls[:4], calls[5]]

    pairs = pair_rows(golden, candidate)

    expected = [call.c for _, call in candidate.calls() for _ in (call.i, call.o)]
    assert [row.call for row in pairs.ids] == expected
    assert pairs.new.tolist() == list(range(12))
    assert pairs.is_equal.all()


def test_tensor_ids_may_be_any_numbers():
    """Ids only tie calls to tensors: gaps and another order change nothing."""
    golden, candidate = captures.Network().run(), captures.Network().run(after="b.x")
    expected = judge(golden, candidate).verdict
    renamed = {old: 1000 - 3 * old for old in candidate.tensors}
    moved = {new: candidate.tensors[old] for old, new in renamed.items()}
    candidate.tensors = dict(sorted(moved.items()))
    for call in candidate.entries:
        if isinstance(call, CallLine):
            for side in (call.i, call.o):
                side.update({s: [renamed[i] for i in ids] for s, ids in side.items()})

    assert judge(golden, candidate).verdict == expected


def seconds_of(action):
    """Processor time of an action, the least of three, and its result."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        result = action()
        taken.append(time.process_time() - start)
    return min(taken), result


def test_many_rows_are_judged_quickly():
    """Judging takes less time than computing its errors row by row would alone."""
    rng = np.random.default_rng(0)
    some = [captures.tensor_line(i, rng.standard_normal((2, 64))) for i in range(200)]
    old = [some[i % 100] for i in range(10_000)]
    new = [some[100 + i % 100] for i in range(10_000)]
    golden, candidate = (
        network_of([copy_of(line, i) for i, line in enumerate(side)])
        for side in (old, new)
    )

    judging, judgement = seconds_of(lambda: judge(golden, candidate))
    pairs = list(zip(old, new, strict=True))
    row_by_row, ratios = seconds_of(lambda: [definition(*pair)[0] for pair in pairs])

    assert judgement.verdict.failed == sum(r > 1 for r in ratios) == 10_000
    assert judging < row_by_row


def copy_of(line, number):
    """A tensor line of its own with the numbers of another."""
    return type(line)(**{**{f: getattr(line, f) for f in line.__struct_fields__},
                         "t": number})  # fmt: skip
