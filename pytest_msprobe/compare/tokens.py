# SPDX-License-Identifier: Apache-2.0
"""Compares the generated tokens and their log-probabilities: the headline."""

import math
from collections.abc import Sequence

from pytest_msprobe.dump.capture import Request
from pytest_msprobe.model.verdict import TokenDifference


def _number(value: float | str) -> float:
    return float(value)


def _first_flip(golden: Request, candidate: Request) -> int | None:
    for index, (a, b) in enumerate(zip(golden.tokens, candidate.tokens, strict=False)):
        if a != b:
            return index
    if len(golden.tokens) != len(candidate.tokens):
        return min(len(golden.tokens), len(candidate.tokens))
    return None


def positions_behind_flips(
    golden: Sequence[Request], candidate: Sequence[Request]
) -> dict[int, int]:
    """For each request with another token: how many generated tokens may be judged.

    The token with number k (from 0) is computed before it is fed back, so segments up
    to g<k> have the same inputs.
    """
    here = {request.label: request for request in candidate}
    behind: dict[int, int] = {}
    for request in golden:
        other = here.get(request.label)
        flip = _first_flip(request, other) if other is not None else None
        if flip is not None:
            behind[request.label] = flip
    return behind


def logprob_difference(
    golden: Request, candidate: Request, index: int
) -> tuple[float, bool]:
    """Difference of the log-probability of the golden's token, at one position.

    Returns:
        The absolute difference, and whether it is only a lower bound because the
        token is not among the candidate's best.
    """
    token, old = golden.tokens[index], _number(golden.logprobs[index])
    if candidate.tokens[index] == token:
        return _difference(old, _number(candidate.logprobs[index])), False
    best = {i: _number(value) for i, value in candidate.top[index]}
    if token in best:
        return _difference(old, best[token]), False
    least = min(best.values(), default=-math.inf)
    return max(0.0, old - least), True


def _difference(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    difference = abs(a - b)
    return math.inf if math.isnan(difference) else difference


def compare_tokens(
    golden: Sequence[Request], candidate: Sequence[Request], allowed: float
) -> TokenDifference:
    """Greatest difference of log-probabilities and first flipped token.

    Tokens are compared up to and with the first other token of each request. There the
    candidate's token counts as well as the golden's.

    Args:
        golden: Requests of the golden.
        candidate: Requests of the candidate.
        allowed: Limit of the difference, for the record.
    """
    here = {request.label: request for request in candidate}
    result = TokenDifference(allowed=allowed)
    largest = 0.0
    for request in golden:
        other = here.get(request.label)
        if other is None:
            continue
        flip = _first_flip(request, other)
        common = min(len(request.tokens), len(other.tokens))
        last = common if flip is None else min(flip + 1, common)
        for index in range(last):
            difference, is_bound = logprob_difference(request, other, index)
            if index == flip:
                # Where greedy tokens flip, one of the two tokens must have moved.
                back, is_back_bound = logprob_difference(other, request, index)
                if back > difference:
                    difference, is_bound = back, is_back_bound
            result.compared += 1
            if difference > largest:
                largest = difference
                result.at = (request.label, index)
                result.is_at_least = is_bound
        if flip is not None and result.flipped is None:
            result.flipped = (request.label, flip)
            if flip < common:
                result.golden_token = request.tokens[flip]
                result.token = other.tokens[flip]
    result.largest = largest if math.isfinite(largest) else str(largest)
    return result
