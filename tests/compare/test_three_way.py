# SPDX-License-Identifier: Apache-2.0
"""R of a row: the error relative to the honest one of the same type."""

import captures
import numpy as np
import pytest

from pytest_msprobe.compare.three_way import LIMIT, METRIC, judge_three_ways

ROUNDING = 3e-3
GENERATOR = np.random.default_rng(11)
X, Y, Z = (GENERATOR.standard_normal((6, 256)) for _ in range(3))


def rounded(array, size):
    """An array off by a relative error of this size, another one each time."""
    return array * (1 + size * GENERATOR.standard_normal(array.shape))


def chain(size, *, fault=1.0, has_sum=False, dtype="bfloat16"):
    """Calls a -> b -> c inside `model`; `b` is off by a factor, and so is `c` then.

    Args:
        size: Relative error of every tensor.
        fault: Factor of b's output.
        has_sum: c returns hidden states and residual, whose sum is what counts.
        dtype: Type of the model.
    """
    a, b = rounded(X, size), rounded(Y, size) * fault
    c = rounded(Z, size) * fault
    outputs = (
        {"output.0": c * 0.25, "output.1": c * 0.75} if has_sum else {"output.0": c}
    )
    calls = [
        (captures.module("a"), 1, {}, {"output.0": a}),
        (captures.module("b"), 1, {"input_args.0": a}, {"output.0": b}),
        (captures.module("c"), 1, {"input_args.0": b}, outputs),
        (captures.module("model"), 0, {}, {}),
    ]
    signature = {"level": "L0", "model": {"dtype": dtype}}
    return captures.capture(calls, signature=signature)


def references(*, has_sum=False):
    """Exact and honest reference with equal ids."""
    sides = chain(0.0), chain(ROUNDING)
    if has_sum:
        for side in sides:
            call = next(call for _, call in side.calls() if ".c." in call.c)
            call.o = {"output.0+output.1": call.o["output.0"]}
    return sides


def test_equally_rounded_is_near_one():
    """An error like that of the honest reference has R near 1 and passes."""
    verdict = judge_three_ways(*references(), chain(ROUNDING))

    assert verdict.status == "pass"
    assert verdict.judged == 5
    middle = float(verdict.notes[0].split("median ")[1].split(",")[0])
    assert 0.6 < middle < 1.6


def test_first_row_far_above_is_the_origin():
    """The module whose R is the first far above 1 is named, not what inherits it."""
    verdict = judge_three_ways(*references(), chain(ROUNDING, fault=1.1))

    assert verdict.status == "fail"
    assert verdict.divergence.module == "b"
    assert verdict.divergence.finding.metric == METRIC
    assert verdict.divergence.finding.observed > 2 * LIMIT
    assert verdict.failed == 3


def test_calls_without_counterpart_are_passed_through():
    """A call of which no row has a counterpart does not hide what lies inside it."""
    truth, noise = references()
    candidate = chain(ROUNDING, fault=1.1)

    verdict = judge_three_ways(truth, noise, candidate)

    assert not any(call.o or call.i for _, call in truth.calls() if "model" in call.c)
    assert verdict.divergence.call == captures.module("b")


@pytest.mark.parametrize("fault", [1.0, 1.1])
def test_residual_streams_are_added(fault):
    """Two tensors of the candidate are held against their sum in the references."""
    verdict = judge_three_ways(
        *references(has_sum=True), chain(ROUNDING, fault=fault, has_sum=True)
    )

    assert verdict.judged == 5
    assert (verdict.status == "fail") == (fault != 1.0)
    slots = {finding.row.slot for finding in verdict.worst}
    assert ("output.0+output.1" in slots) == (fault != 1.0)


def test_exact_references_leave_one_rounding():
    """Where both references agree exactly, one rounding of the type is allowed."""
    truth, _ = references()

    passed = judge_three_ways(truth, truth, chain(2e-3))
    failed = judge_three_ways(truth, truth, chain(5e-2))

    assert passed.status == "pass"
    assert failed.status == "fail"


def test_nothing_in_common_fails():
    """A capture of which no row has a counterpart is no pass."""
    truth, noise = references()
    for _, call in [*truth.calls(), *noise.calls()]:
        call.i, call.o = {}, {}

    verdict = judge_three_ways(truth, noise, chain(ROUNDING))

    assert verdict.status == "fail"
    assert verdict.reasons == ["no row has a counterpart in the references"]
