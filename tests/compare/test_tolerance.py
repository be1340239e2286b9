# SPDX-License-Identifier: Apache-2.0
"""Which limit applies."""

import numpy as np
import pytest

from pytest_msprobe.compare.tolerance import (
    default_limits,
    resolve_limits,
    unmatched_error,
    with_floor,
)
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

    for metric in LIMIT_NAMES:
        assert same[metric] < moved[metric] <= cross[metric]


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
    assert f"the nearest row is {NAMES[0]}" in text


def test_the_floor_of_storage_is_added_to_the_sketchs_metric():
    """Only rel_l2 is computed from stored sketches, and only int16 ones are coarse."""
    limit = np.array([1e-3, 1e-3])
    is_coarse = np.array([True, False])

    for metric in ROW_METRICS:
        raised = with_floor(limit, metric, is_coarse) > limit
        assert raised.tolist() == [metric == "rel_l2", False]


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
