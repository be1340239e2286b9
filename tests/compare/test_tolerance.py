# SPDX-License-Identifier: Apache-2.0
"""Which limit applies."""

import numpy as np
import pytest
import yaml
from captures import tensor_line
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.compare.tolerance import (
    common_glob,
    default_limits,
    floors,
    matching,
    resolve_limits,
    rule_text,
    unmatched_error,
)
from pytest_msprobe.dump.columns import columns_of
from pytest_msprobe.model.limits import LIMIT_NAMES, ROW_METRICS, Rule

NAMES = ["Module.a.M.forward.0.output.0", "Module.b.M.forward.0.output.0"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", ""])
@pytest.mark.parametrize("mode", ["same", "cross"])
def test_every_metric_has_a_default(dtype, mode):
    """For each dtype and key relation every metric has a limit above 0."""
    limits = default_limits(mode, dtype)

    assert set(limits) == set(LIMIT_NAMES)
    assert all(limit > 0 for limit in limits.values())


def test_defaults_widen_with_what_differs():
    """Another schedule allows more than the same one, another key more still."""
    same = default_limits("same", "bfloat16")
    moved = default_limits("same", "bfloat16", is_rescheduled=True)
    cross = default_limits("cross", "bfloat16")
    mixture = default_limits("cross", "bfloat16", is_mixture=True)

    for metric in LIMIT_NAMES:
        assert same[metric] < moved[metric] <= cross[metric] <= mixture[metric]
    for mode, dtype in (("same", "bfloat16"), ("cross", "float16")):
        alike = default_limits(mode, dtype, is_mixture=True)
        assert alike == default_limits(mode, dtype)


def test_a_rule_applies_to_the_rows_it_names():
    """A glob over row names selects rows; the others keep their default."""
    rule = Rule("f:3", rows="Module.a.*", limits={"max": 0.5})
    defaults = default_limits("same", "bfloat16")

    limits = resolve_limits(NAMES, [rule], defaults, "same")

    assert limits.limits["max"].tolist() == [0.5, defaults["max"]]
    assert [limits.origin("max", i) for i in (0, 1)] == ["f:3", "default"]
    assert limits.origin("norm", 0) == "default"


def test_the_limit_of_log_probabilities():
    """A rule can set it, the last one wins."""
    rules = [Rule("a", limits={"logprob": 0.5}), Rule("b", limits={"logprob": 0.7})]

    limits = resolve_limits(NAMES, rules, default_limits("same", "bfloat16"), "same")

    assert limits.logprob == 0.7


def test_the_nearest_row_is_named():
    """A glob that matches nothing is answered with the nearest row."""
    rule = Rule("f:3", rows="Module.aa.M.forward.0.output.0", ignore=True)

    text = str(unmatched_error(rule, NAMES))

    assert text.startswith("f:3: rows 'Module.aa.")
    assert f"the nearest rows are {NAMES[0]}" in text


def test_the_floor_of_storage_is_added_to_the_sketchs_metric():
    """Only rel_l2 is computed from stored sketches, and only int16 ones are coarse."""
    lines = [tensor_line(0, np.ones((2, 2)), kind=kind) for kind in "tn"]
    columns = columns_of(lines)

    found = floors(columns, columns, is_dump=False)

    assert {name for name in ROW_METRICS if found[name].any()} == {"rel_l2"}
    assert (found["rel_l2"] > 0).tolist() == [True, False]


def test_means_and_norms_of_a_dump_may_be_rounded_to_the_dtype():
    """One unit in the last place of its dtype is added; extremes are exact."""
    lines = [tensor_line(0, np.ones((2, 2)), kind=kind) for kind in "tn"]
    columns = columns_of(lines)

    found = floors(columns, columns, is_dump=True)

    assert found["mean"].tolist() == found["norm"].tolist() == [2.0**-7, 2.0**-23]
    assert not found["max"].any()


def test_rows_of_another_scheduling_have_their_own_defaults():
    """Defaults go row by row, rules come on top of both."""
    same = default_limits("same", "bfloat16")
    moved = default_limits("same", "bfloat16", is_rescheduled=True)
    rule = Rule("r", limits={"max": 0.5, "logprob": 0.25})

    limits = resolve_limits(
        NAMES, [rule], same, "same", moved=(np.array([False, True]), moved)
    )

    assert limits.limits["norm"].tolist() == [same["norm"], moved["norm"]]
    assert limits.limits["max"].tolist() == [0.5, 0.5]
    assert (limits.logprob, limits.moved_logprob) == (0.25, 0.25)


def test_rtol_and_atol_stand_for_all_row_metrics():
    """A pair sets the limit of every metric; a metric's own limit replaces it."""
    rules = [
        Rule("a", limits={"rtol": 0.1, "atol": 0.2, "max": 0.3}),
        Rule("b", rows="Module.b.*", limits={"norm": 0.4}),
    ]

    limits = resolve_limits(NAMES, rules, default_limits("same", "bfloat16"), "same")

    assert limits.limits["mean"].tolist() == [0.1, 0.1]
    assert limits.absolute["mean"].tolist() == [0.2, 0.2]
    assert (limits.limits["max"][0], limits.absolute["max"][0]) == (0.3, 0.0)
    assert limits.limits["norm"].tolist() == [0.1, 0.4]
    assert limits.absolute["norm"].tolist() == [0.2, 0.0]
    assert limits.origin("norm", 1) == "b"


def test_only_leaves_all_other_rows_out():
    """Rows that no `only` rule of this key relation names are not judged."""
    rules = [
        Rule("a", rows="Module.a.*", only=True),
        Rule("b", rows="*.nothing", only=True, mode="cross"),
    ]
    defaults = default_limits("same", "bfloat16")

    same = resolve_limits(NAMES, rules, defaults, "same")
    none = resolve_limits(NAMES, [], defaults, "same")

    assert same.is_ignored.tolist() == [False, True]
    assert none.is_ignored.tolist() == [False, False]


@given(st.lists(st.text("ab.*?[0", min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_common_glob_names_all_of_its_rows(names):
    """Whatever the rows are called, the glob matches each of them."""
    assert matching(Rule("", common_glob(names)), names).all()


@given(st.floats(1e-12, 1e6))
def test_a_printed_limit_is_just_above_what_is_needed(limit):
    """The line is YAML; its limit suffices and 99 % of it does not."""
    (entry,) = yaml.safe_load(rule_text("Module.*", "same", {"norm": limit}))

    assert float(entry["norm"]) >= limit > 0.99 * float(entry["norm"])
    assert (entry["rows"], entry["mode"]) == ("Module.*", "same")


def test_a_rule_for_other_rows_sets_no_log_probability():
    """One that names no row of a capture leaves the limit of its tokens alone."""
    defaults = default_limits("same", "bfloat16")
    names = ["Module.a.M.forward.0.output.0@0.prompt"]

    def logprob(rows):
        rule = Rule("r", rows=rows, limits={"logprob": 5.0})
        return resolve_limits(names, [rule], defaults, "same").logprob

    assert logprob("*experts*") == defaults["logprob"]
    assert logprob("Module.a.*") == 5.0
