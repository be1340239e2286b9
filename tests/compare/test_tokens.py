# SPDX-License-Identifier: Apache-2.0
"""Generated tokens and their log-probabilities."""

import math

import pytest
from captures import capture, request, step_line

from pytest_msprobe.compare.tokens import (
    compare_tokens,
    implied_tokens,
    positions_behind_flips,
    unrecorded_tokens,
)
from pytest_msprobe.dump.capture import StepLine


def difference(golden, candidate, allowed=0.01):
    """The comparison of one request."""
    return compare_tokens([golden], [candidate], allowed)


def test_equal_tokens_have_no_difference():
    """The same tokens and log-probabilities differ by nothing."""
    found = difference(request(), request())

    assert (found.largest, found.flipped, found.compared) == (0.0, None, 2)


def test_the_greatest_difference_and_where():
    """The greatest difference is taken at the golden's token."""
    found = difference(request(), request(logprobs=(-0.15, -0.5)))

    assert found.largest == pytest.approx(0.3)
    assert found.at == (0, 1)


def test_tokens_behind_a_flip_do_not_count():
    """What was generated from another token is not compared."""
    golden = request((5, 6, 7), (-0.1, -0.1, -0.1))
    candidate = request((5, 9, 1), (-0.1, -0.1, -4.0))

    found = difference(golden, candidate)

    assert found.compared == 2
    assert found.flipped == (0, 1)
    assert (found.golden_token, found.token) == (6, 9)
    assert positions_behind_flips([golden], [candidate]) == {0: 1}


def test_a_flip_with_a_clear_lead_moves_one_of_the_two():
    """A flip with a lead is a difference although the golden's token stayed."""
    golden = request((5,), (-0.1,))
    candidate = request((6,), (-0.05,))
    candidate.top[0] = [(6, -0.05), (5, -0.1)]

    found = difference(golden, candidate)

    assert found.largest == pytest.approx(2.1 - 0.05)


def test_a_near_tie_may_flip():
    """Where the golden had no lead, a flip is within the tolerance."""
    golden, candidate = request((5,), (-0.700,)), request((6,), (-0.699,))
    golden.top[0] = [(5, -0.700), (6, -0.701)]
    candidate.top[0] = [(6, -0.699), (5, -0.702)]

    found = difference(golden, candidate)

    assert found.largest == pytest.approx(0.002)
    assert found.flipped == (0, 0)


def test_a_token_that_left_the_best_gives_a_bound():
    """A token outside the candidate's best is 'at least' that far away."""
    golden, candidate = request((5,), (-0.1,)), request((50,), (-0.2,))
    golden.top[0] = [(5, -0.1), (50, -0.21)]

    found = difference(golden, candidate)

    assert found.is_at_least
    assert found.largest == pytest.approx(-0.1 - (-3.2))


def test_one_side_that_ends_early_is_a_flip():
    """Another number of tokens is reported where one side ends."""
    found = difference(request((5, 6), (-0.1, -0.1)), request((5,), (-0.1,)))

    assert found.flipped == (0, 1)
    assert found.token is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("nan", "nan", 0.0),
        ("-inf", "-inf", 0.0),
        ("nan", -0.1, "inf"),
        (-0.1, "-inf", "inf"),
    ],
)
def test_nonfinite_log_probabilities(old, new, expected):
    """NaN equals NaN, and anything else against it is infinitely far."""
    golden = request((5,), (-0.1,), top=[[(5, old)]])
    candidate = request((5,), (-0.1,), top=[[(5, new)]])
    golden.logprobs, candidate.logprobs = [old], [new]

    assert difference(golden, candidate).largest == expected


def test_requests_are_paired_by_label():
    """Each request is compared with the one of its label."""
    golden = [request((5,), (-0.1,)), request((7,), (-0.2,), label=1)]
    candidate = [golden[1], golden[0]]

    found = compare_tokens(golden, candidate, 0.01)

    assert found.compared == 2
    assert not math.isnan(found.largest)
    assert found.largest == 0.0


def test_more_tokens_than_the_golden_are_no_flip():
    """A capture that goes on where the golden ends has flipped nothing."""
    found = difference(request((5,), (-0.1,)), request((5, 6), (-0.1, -0.1)))

    assert (found.flipped, found.compared) == (None, 1)


def test_an_end_without_a_record_is_no_flip():
    """Tokens that were not recorded say nothing about the ones that were."""
    golden, candidate = request((5, 6, 7), (-0.1,) * 3), request((5,), (-0.1,))

    found = compare_tokens([golden], [candidate], 0.01, incomplete={0})
    flipped = request((50,), (-0.1,))

    assert (found.flipped, found.compared) == (None, 1)
    assert positions_behind_flips([golden], [flipped], {0}) == {0: 0}


def test_steps_imply_tokens():
    """Each step whose last token is the prompt's last or a later one samples one."""
    chunks = [
        StepLine(0, 3, [(0, 3, 0)]),  # half a prompt of 4: nothing is sampled
        StepLine(1, 5, [(0, 1, 3), (1, 4, 0)]),
        StepLine(2, 2, [(0, 1, 4), (1, 1, 4)]),
        StepLine(3, 1, [(0, 1, 5)]),
    ]
    two = [request((5, 6, 7), (-0.1,) * 3), request((5,), (-0.1,), label=1)]
    recorded = capture([], steps=0, requests=two)
    recorded.entries += chunks

    assert implied_tokens(recorded) == {0: 3, 1: 2}
    assert unrecorded_tokens(recorded) == {1: (1, 2)}


def test_unknown_steps_imply_nothing():
    """Without a layout of the steps no token is missed."""
    recorded = capture([], steps=0, requests=[request()])
    recorded.entries.append(StepLine(0))

    assert unrecorded_tokens(recorded) == {}
    recorded.entries += [step_line(step) for step in range(3)]
    assert unrecorded_tokens(recorded) == {0: (1, 3)}


def test_the_worst_difference_is_that_against_its_limit():
    """Where tokens have limits of their own, the reported one is nearest to failing."""
    golden = request((5, 6), (-0.1, -0.1))
    candidate = request((5, 6), (-0.12, -0.15))

    found = compare_tokens(
        [golden], [candidate], 0.01, limit_of=lambda _, number: 0.01 + number
    )

    assert found.at == (0, 0)
    assert found.largest == pytest.approx(0.02)
    assert found.allowed == 0.01


@pytest.mark.parametrize("is_golden", [True, False])
def test_log_probabilities_that_are_no_numbers_are_never_equal_to_numbers(is_golden):
    """Logits of NaN sample any token and have any best ones: the difference is inf."""
    clean = request((5,), (-0.1,))
    broken = request((0,), (math.nan,))
    broken.top = [[(token, math.nan) for token in range(3)]]
    sides = (broken, clean) if is_golden else (clean, broken)

    found = compare_tokens(*([side] for side in sides), 0.01)

    assert found.largest == "inf"
    assert found.flipped == (0, 0)


def forced(own, top):
    """A request that was fed the golden's tokens (5, 6) and would sample others."""
    made = request((5, 6), (-0.1, -0.2), own=list(own))
    made.top[1] = top
    return made


def test_what_a_forced_request_would_have_sampled_is_a_flip():
    """Fed the golden's tokens all are compared; its own other one is shown."""
    near = forced((5, 9), [(9, -0.19), (6, -0.2)])
    golden = request((5, 6), (-0.1, -0.2))
    golden.top[1] = [(6, -0.2), (9, -0.195)]

    found = difference(golden, near)

    assert (found.compared, found.flipped) == (2, (0, 1))
    assert (found.golden_token, found.token) == (6, 9)
    assert found.largest == pytest.approx(0.005)
    assert positions_behind_flips([golden], [near]) == {}


def test_the_own_token_of_a_forced_request_counts_as_well():
    """Its log-probability may not have moved by more than is allowed either."""
    far = forced((5, 9), [(9, -0.1), (6, -0.2)])

    assert difference(request((5, 6), (-0.1, -0.2)), far).largest == pytest.approx(3.1)
