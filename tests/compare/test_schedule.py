# SPDX-License-Identifier: Apache-2.0
"""Where requests were scheduled differently, request by request."""

import pytest
from captures import capture, request
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.compare.schedule import compare_schedules
from pytest_msprobe.dump.capture import StepLine

# Two requests with prompts of 4 tokens, one after the other and together.
ONE_BY_ONE = [[(0, 4, 0)], [(0, 1, 4)], [(0, 1, 5)], [(1, 4, 0)], [(1, 1, 4)]]
TOGETHER = [[(0, 4, 0), (1, 4, 0)], [(0, 1, 4), (1, 1, 4)], [(0, 1, 5)]]


def steps(batches):
    """A capture of two requests with these batches and without any row."""
    made = capture([], steps=0, requests=[request(label=n) for n in (0, 1)])
    for number, batch in enumerate(batches):
        tokens = sum(rows for _, rows, _ in batch)
        made.entries.append(StepLine(number, tokens, batch))
    return made


def compared(golden, candidate, flips=None):
    """How one list of batches relates to another."""
    return compare_schedules(steps(golden), steps(candidate), flips or {})


@pytest.mark.parametrize("batches", [ONE_BY_ONE, TOGETHER])
def test_the_same_steps_are_no_difference(batches):
    """Equal batches move nothing, and all their steps are comparable."""
    found = compared(batches, batches)

    assert found.moved == {}
    assert found.equal_steps == found.needed_steps == set(range(len(batches)))


@given(st.sampled_from([ONE_BY_ONE, TOGETHER]), st.integers(0, 4), st.booleans())
def test_an_end_is_no_difference(batches, length, is_golden):
    """Whichever side has fewer steps, what both have is scheduled the same."""
    sides = batches[:length], batches

    found = compared(*(sides if is_golden else sides[::-1]))

    assert found.moved == {}
    assert found.equal_steps == set(range(min(length, len(batches))))


def test_one_decode_step_more_moves_no_later_request():
    """Requests that run one after the other may begin at another step."""
    longer = [*ONE_BY_ONE[:3], [(0, 1, 6)], *ONE_BY_ONE[3:]]

    found = compared(ONE_BY_ONE, longer)

    assert found.moved == {}
    assert found.equal_steps == {0, 1, 2}
    # The later steps are there under other numbers: their whole tensors are not asked.
    assert found.needed_steps == {0, 1, 2}


def test_chunks_and_batches_move_their_requests():
    """A request is moved from the first chunk on that is another one or has company."""
    chunked = [[(0, 2, 0)], [(0, 2, 2)], *ONE_BY_ONE[1:]]

    assert compared(ONE_BY_ONE, chunked).moved == {0: 0}
    assert compared(ONE_BY_ONE, TOGETHER).moved == {0: 0, 1: 0}
    later = [ONE_BY_ONE[0], [(0, 1, 4), (1, 4, 0)], [(0, 1, 5), (1, 1, 4)]]
    assert compared(ONE_BY_ONE, later).moved == {0: 4, 1: 0}


def test_steps_of_moved_requests_are_not_comparable():
    """Whole tensors hold what earlier steps left: equal steps behind are no help."""
    joined = [TOGETHER[0], ONE_BY_ONE[1]]

    found = compared(ONE_BY_ONE[:2], joined)

    assert found.moved == {0: 0}
    assert found.equal_steps == found.needed_steps == set()


def test_segments_are_moved_by_their_positions():
    """What was computed before a request moved keeps the limits it had."""
    later = [ONE_BY_ONE[0], [(0, 1, 4), (1, 4, 0)]]

    found = compared(ONE_BY_ONE, later)

    moved = {"0.g1", "0.g2", "1.first", "1.prompt", "1.g1"}
    kept = {"0.first", "0.prompt", "", "pad", "2.first"}
    assert {s for s in moved | kept if found.is_moved(s)} == moved
    assert [found.is_token_moved(0, k) for k in (0, 1, 2)] == [False, True, True]
    assert found.is_token_moved(1, 0)


def test_nothing_behind_a_flip_is_compared():
    """What is scheduled behind a request's first other token moves nothing of it."""
    ended = [TOGETHER[0], TOGETHER[1]]
    alone = [TOGETHER[0], [(1, 1, 4)]]

    assert compared(TOGETHER, ended, {0: 1}).moved == {}
    # Request 0 ended with its first token; request 1 then ran without it.
    assert compared(TOGETHER, alone, {0: 0}).moved == {1: 4}
    apart = [TOGETHER[0], [(0, 1, 4)], [(1, 1, 4)]]
    assert compared(TOGETHER, apart, {0: 0}).moved == {1: 4}
    assert compared(TOGETHER, apart).moved == {0: 4, 1: 4}


def test_segments_behind_a_flip_are_known():
    """A flipped token's own segment is compared, those that it was fed to are not."""
    found = compared(TOGETHER, TOGETHER, {0: 0, 1: 1})

    segments = {f"{n}.{p}" for n in (0, 1) for p in ("first", "prompt", "g1", "g2")}
    assert {s for s in segments if found.is_behind(s)} == {"0.g1", "0.g2", "1.g2"}
    assert {s for s in segments if found.is_flip(s)} == {"0.prompt", "1.g1"}
    assert found.behind_steps == {1, 2}
    assert found.equal_steps == found.needed_steps == {0}


def test_a_prompt_of_one_token_flips_at_its_first_position():
    """The segment that token 0 is sampled from is that of the last prompt token."""
    made = [capture([], requests=[request(prompt_tokens=1)]) for _ in range(2)]

    assert compare_schedules(*made, {0: 0}).is_flip("0.first")
