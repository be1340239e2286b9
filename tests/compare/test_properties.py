# SPDX-License-Identifier: Apache-2.0
"""What judging must not depend on, and what no arrangement may hide."""

import copy
import math

import msgspec
import numpy as np
import pytest
import random_captures
import yaml
from captures import Network, capture, module
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.metrics import Error, row_errors
from pytest_msprobe.compare.ranks import combine_ranks, first_failure
from pytest_msprobe.dump.capture import CallLine, StepLine
from pytest_msprobe.dump.columns import columns_of
from pytest_msprobe.model.limits import ROW_METRICS, Rule

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
@example(math.inf, math.inf)
@given(st.floats(allow_nan=True), st.floats(0, allow_nan=False))
def test_errors_are_never_nan(difference, scale):
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


MANY = settings(max_examples=60, deadline=None)
PAIRS = random_captures.pairs()


@MANY
@given(PAIRS)
def test_the_printed_tolerance_is_the_least_one(pair):
    """Of any failing pair the printed rule lets it pass, and 99 % of it does not."""
    _, golden, candidate = pair
    failing = judge(golden, candidate).verdict
    if failing.is_green or not failing.judged:
        return
    (entry,) = yaml.safe_load(failing.would_pass)
    rows, mode = entry.pop("rows"), entry.pop("mode")

    def judged_with(share):
        limits = {name: share * float(limit) for name, limit in entry.items()}
        return judge(golden, candidate, [Rule("printed", rows, mode, limits)]).verdict

    assert judged_with(1.0).is_green
    for name in entry:
        # Every metric that is named is needed: all others are wide open.
        limits = dict.fromkeys([*ROW_METRICS, "logprob"], math.inf)
        limits[name] = 0.99 * float(entry[name])
        rule = Rule("less", rows, mode, limits)
        assert judge(golden, candidate, [rule]).verdict.status == "fail", name
    assert judged_with(0.99).status == "fail"


@MANY
@given(PAIRS, SEEDS)
def test_no_arrangement_of_lines_changes_a_verdict(pair, seed):
    """Other ids, another order of lines and of slots: the same counts and findings."""
    _, golden, candidate = pair
    expected = essence(golden, candidate)

    assert essence(golden, with_other_ids(candidate, seed)) == expected
    assert essence(with_other_ids(golden, seed), candidate) == expected


@MANY
@given(PAIRS, SEEDS)
def test_order_of_siblings_changes_no_verdict(pair, seed):
    """The same calls in any order of theirs have the same rows and findings."""
    plan, golden, candidate = pair
    top = [i for i, e in enumerate(candidate.entries) if isinstance(e, CallLine)]
    order = np.random.default_rng(seed).permutation(top).tolist()
    moved = copy.deepcopy(candidate)
    moved.entries[1:] = [moved.entries[i] for i in order]
    for entry in moved.entries[1:]:
        entry.l = 0
    if any(part.startswith("Functional") for part in plan["calls"]):
        return  # operators are known by the module around them

    flat = copy.deepcopy(candidate)
    for entry in flat.entries[1:]:
        entry.l = 0
    assert counts_of(golden, moved) == counts_of(golden, flat)


def counts_of(golden, candidate):
    """What a verdict says of rows, but which of them are listed."""
    verdict = judge(golden, candidate).verdict
    return verdict.status, verdict.judged, verdict.equal, verdict.failed


@MANY
@given(random_captures.plans(), st.booleans())
def test_steps_that_requests_share_or_not_change_no_verdict_across_keys(plan, changed):
    """Requests in one step or each in its own: the same rows are judged the same."""
    # Across keys limits do not depend on the scheduling. Rows without a token
    # dimension do: they are of a step.
    parts = [p for p in plan["calls"] if plan["forms"][p] != [""]]
    plan = {**plan, "calls": parts, "changed": plan["changed"] & set(parts)}
    golden = random_captures.build(plan, is_changed=False, key="cpu-other")
    candidate = random_captures.build(plan, is_changed=changed)

    expected, found = counts_of(golden, candidate), counts_of(golden, split(candidate))
    assert found == expected


def split(together):
    """The same rows, each request computed in a step of its own."""
    apart = copy.deepcopy(together)
    apart.entries = []
    for label in (0, 1):
        apart.entries.append(StepLine(label, 4, [(label, 4, 0)]))
        for call in together.entries[1:]:
            line = copy.deepcopy(call)
            for slots in (line.i, line.o):
                for slot, ids in slots.items():
                    slots[slot] = [
                        i for i in ids if together.tensors[i].g.startswith(f"{label}.")
                    ]
            apart.entries.append(line)
    return apart


@MANY
@given(PAIRS, SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_number_that_is_none_fails_wherever_it_stands(pair, seed, value):
    """One element of one judged output that became NaN or infinite: no limit helps."""
    plan, golden, _ = pair
    rng = np.random.default_rng(seed)
    modules = [p for p in plan["calls"] if not p.startswith("Functional")]
    if not modules:
        return
    part = modules[rng.integers(len(modules))]
    segment = plan["forms"][part][rng.integers(len(plan["forms"][part]))]

    def spoil(call, where, array):
        if (call, where) == (part, segment):
            array.flat[rng.integers(array.size)] = value

    candidate = random_captures.build(plan, is_changed=True, spoil=spoil)
    generous = Rule("r", limits=dict.fromkeys([*ROW_METRICS, "logprob"], math.inf))

    verdict = judge(golden, candidate, [generous]).verdict

    assert verdict.status == "fail"
    assert verdict.failed == 1
    assert verdict.would_pass == ""
    (found,) = {f.row.segment: f for f in verdict.worst}.values()
    assert (found.metric, found.row.segment) == ("nonfinite", segment)


@MANY
@given(PAIRS, SEEDS)
def test_numbers_that_both_sides_lack_hide_nothing(pair, seed):
    """A NaN in the same place of both sides leaves every other difference failing."""
    plan, _, _ = pair
    if plan["change"] is random_captures.CHANGES[2]:
        return  # the one element that differs may be the one that is lost
    plan = {**plan, "size": max(plan["size"], 0.5), "shift": 0.0}

    def spoil(call, segment, array):
        place = np.random.default_rng(seed + len(call) + len(segment))
        array.flat[place.integers(array.size)] = np.nan

    sides = [
        random_captures.build(plan, is_changed=flag, spoil=spoil)
        for flag in (False, True)
    ]
    plain = [random_captures.build(plan, is_changed=flag) for flag in (False, True)]

    assert judge(sides[0], sides[0]).verdict.status == "pass"
    assert judge(*sides).verdict.failed == judge(*plain).verdict.failed


@MANY
@given(
    st.lists(random_captures.plans(), min_size=2, max_size=4),
    st.permutations(range(4)),
)
def test_the_order_of_ranks_changes_nothing(chosen, order):
    """Each rank has its verdict, and the one that is shown is always the same."""
    world = len(chosen)
    sides = [
        [
            random_captures.build(plan, is_changed=flag, rank=rank, world=world)
            for rank, plan in enumerate(chosen)
        ]
        for flag in (False, True)
    ]
    verdicts = [judge(*pair).verdict for pair in zip(*sides, strict=True)]
    failures = [v for v in verdicts if not v.is_green]
    if not failures:
        return
    places = [place for place in order if place < world]
    mixed = [judge(sides[0][p], sides[1][p]).verdict for p in places]

    first = first_failure(failures, sides[1])
    again = first_failure(
        [v for v in mixed if not v.is_green], [sides[1][p] for p in places]
    )

    assert [mixed[places.index(r)] for r in range(world)] == verdicts
    assert again == first
