# SPDX-License-Identifier: Apache-2.0
"""What judging must not depend on, and what no arrangement may hide."""

import copy

import msgspec
import numpy as np
import pytest
from captures import Network, capture, module
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.match import columns_of
from pytest_msprobe.compare.metrics import Error, row_errors
from pytest_msprobe.compare.ranks import combine_ranks
from pytest_msprobe.dump.capture import CallLine, StepLine
from pytest_msprobe.model.limits import ROW_METRICS

NETWORK = Network()
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None)


def essence(golden, candidate):
    """What a verdict says of rows, whatever they are called and wherever they stand."""
    verdict = judge(golden, candidate).verdict
    worst = sorted((f.row.text, f.metric, f.observed) for f in verdict.worst)
    counts = verdict.judged, verdict.equal, verdict.failed, verdict.missing
    return verdict.status, counts, worst


def with_other_ids(capture_file, seed):
    """The same capture with other ids of tensors, and slots in another order."""
    generator = np.random.default_rng(seed)
    found = copy.deepcopy(capture_file)
    old = list(found.tensors)
    new = dict(zip(old, (generator.permutation(len(old)) + 7).tolist(), strict=True))
    found.tensors = {
        new[i]: msgspec.structs.replace(found.tensors[i], t=new[i])
        for i in generator.permutation(old).tolist()
    }
    for call in found.entries:
        if isinstance(call, CallLine):
            for slots in (call.i, call.o):
                names = generator.permutation(list(slots)).tolist()
                items = {name: [new[i] for i in slots[name]] for name in names}
                slots.clear()
                slots.update(items)
    return found


@FEW
@given(st.sampled_from([None, "a", "b.x", "c"]), SEEDS)
def test_order_and_ids_of_tensors_do_not_matter(after, seed):
    """A capture whose lines and slots stand in another order has the same verdict."""
    golden, candidate = NETWORK.run(), NETWORK.run(after=after)

    expected = essence(golden, candidate)

    assert essence(golden, with_other_ids(candidate, seed)) == expected
    assert essence(with_other_ids(golden, seed), candidate) == expected


def siblings(order, faulty=()):
    """A module whose leaves ran in an order; some give something else."""
    calls = []
    for name in order:
        x = np.random.default_rng(ord(name)).standard_normal((4, 8))
        y = x * (1.5 if name in faulty else 1.0)
        calls.append((module(f"m.{name}"), 1, {"input_args.0": x}, {"output.0": y}))
    return capture([*calls, (module("m"), 0, {}, {"output.0": np.ones((4, 8))})])


@FEW
@given(st.permutations("abcde"), st.sets(st.sampled_from("abcde")))
def test_the_order_of_siblings_does_not_matter(order, faulty):
    """Modules that ran in another order are judged the same, row by row."""
    golden = siblings("abcde")

    assert essence(golden, siblings(order, faulty)) == essence(
        golden, siblings("abcde", faulty)
    )


@FEW
@given(st.sampled_from([None, "a", "c"]), st.integers(1, 50))
def test_numbers_of_steps_do_not_matter(after, first):
    """Rows of requests are known by request and position, not by their step."""
    golden, candidate = NETWORK.run(steps=3), NETWORK.run(steps=3, after=after)
    moved = copy.deepcopy(candidate)
    for entry in moved.entries:
        if isinstance(entry, StepLine):
            entry.step += first

    assert essence(golden, moved) == essence(golden, candidate)


@FEW
@given(st.sampled_from([None, "a", "b.y"]))
def test_steps_that_are_split_do_not_matter(after):
    """A step that was recorded as two parts has the same verdict."""
    golden, candidate = NETWORK.run(steps=2), NETWORK.run(steps=2, after=after)
    parts = copy.deepcopy(candidate)
    place = next(
        i for i, e in enumerate(parts.entries) if i and isinstance(e, StepLine)
    )
    # An empty step, as data parallelism has them, stands between.
    parts.entries.insert(place, StepLine(77))

    assert essence(golden, parts) == essence(golden, candidate)


@FEW
@given(st.permutations([0, 1, 2, 3]), st.sampled_from([1.0, 1.5]))
def test_the_order_of_ranks_does_not_matter(order, factor):
    """Shards add up to the same rows, whatever rank comes first."""

    def rank(number):
        x = np.random.default_rng(number).standard_normal((4, 8))
        calls = [(module("m"), 0, {}, {"output.0": x * factor})]
        result = capture(calls, rank=number, world=4)
        for _, call in result.calls():
            call.p = {"output.0": 32}
        return result

    straight = combine_ranks([rank(number) for number in range(4)])
    mixed = combine_ranks([rank(number) for number in order])
    (a,), (b,) = straight.tensors.values(), mixed.tensors.values()

    assert (a.c, a.s, a.v[:2]) == (b.c, b.s, b.v[:2])
    assert a.v[2:] == pytest.approx(b.v[2:])
    assert judge(straight, mixed).verdict.status == "pass"


@FEW
@given(
    st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0]), min_size=4),
    st.integers(0, 3),
    st.floats(0.1, 1e6),
)
def test_nan_never_hides_a_difference(values, place, change):
    """Whatever stands beside it, another element fails, and a lost NaN too."""
    golden = np.array([values[:4]] * 2)
    candidate = golden.copy()
    old = candidate[0, place]
    candidate[0, place] = change if not np.isfinite(old) else old + change

    def verdict_of(a, b):
        slots = [(module("m"), 0, {}, {"output.0": side}) for side in (a, b)]
        return judge(*(capture([slot]) for slot in slots)).verdict

    assert verdict_of(golden, golden).status == "pass"
    failing = verdict_of(golden, candidate)
    assert failing.status == "fail"
    assert failing.failed == 1


@FEW
@given(st.floats(allow_nan=True), st.floats(0, allow_nan=False), SEEDS)
def test_errors_are_never_nan(difference, scale, seed):
    """Whatever is divided, the error is a number, and a NaN is infinitely wrong."""
    error = Error(np.abs([difference]), np.array([scale]), np.ones(1))
    (relative,) = error.relative

    assert not np.isnan(relative)
    assert relative >= 0
    assert np.isinf(relative) or not np.isnan(difference)


@FEW
@given(SEEDS, st.floats(1e-6, 1e6))
def test_errors_do_not_depend_on_the_unit(seed, unit):
    """Both sides in another unit have the same errors."""
    generator = np.random.default_rng(seed)
    golden = generator.standard_normal((4, 8))
    candidate = golden + 0.01 * generator.standard_normal((4, 8))

    def errors_of(scale):
        sides = (capture([(module("m"), 0, {}, {"output.0": side * scale})])
                 for side in (golden, candidate))  # fmt: skip
        return row_errors(*(columns_of(list(s.tensors.values())) for s in sides))

    one, other = errors_of(1.0), errors_of(unit)
    for metric in ROW_METRICS:
        assert one[metric].relative == pytest.approx(other[metric].relative, rel=2e-2)
