# SPDX-License-Identifier: Apache-2.0
"""Compares the generated tokens and their log-probabilities: the headline."""

import math
from collections.abc import Callable, Collection, Sequence

from pytest_msprobe.dump.capture import CaptureFile, Request
from pytest_msprobe.model.verdict import TokenDifference, portable


def implied_tokens(capture: CaptureFile) -> dict[int, int]:
    """For each request how many tokens its recorded steps must have sampled.

    A step samples a token for each request whose last prompt token, or a later one, is
    the last that it computes.
    """
    prompts = {r.label: r.prompt_tokens for r in capture.header.requests}
    implied = dict.fromkeys(prompts, 0)
    for step in capture.steps:
        for label, rows, position in step.requests:
            if label in prompts and position + rows >= prompts[label]:
                implied[label] += 1
    return implied


def unrecorded_tokens(capture: CaptureFile) -> dict[int, tuple[int, int]]:
    """Requests with fewer tokens than their steps sampled: missing ones of how many."""
    implied = implied_tokens(capture)
    return {
        request.label: (implied[request.label] - len(request.tokens),
                        implied[request.label])
        for request in capture.header.requests
        if len(request.tokens) < implied[request.label]
    }  # fmt: skip


def _first_flip(golden: Request, candidate: Request) -> int | None:
    """The first token of the golden that the candidate has not."""
    for index, (a, b) in enumerate(zip(golden.tokens, candidate.tokens, strict=False)):
        if a != b:
            return index
    if len(golden.tokens) > len(candidate.tokens):
        return len(candidate.tokens)
    return None


def positions_behind_flips(
    golden: Sequence[Request],
    candidate: Sequence[Request],
    incomplete: Collection[int] = (),
) -> dict[int, int]:
    """For each request with another token: number of the first one, from 0.

    Token k is computed before it is fed back, so what is computed up to it has the same
    inputs.

    Args:
        golden: Requests of the golden.
        candidate: Requests of the candidate.
        incomplete: Labels of requests whose last tokens were not recorded: that they
            end early tells nothing.
    """
    here = {request.label: request for request in candidate}
    flips: dict[int, int] = {}
    for request in golden:
        other = here.get(request.label)
        flip = _first_flip(request, other) if other is not None else None
        if flip is None or other is None:
            continue
        if flip < len(other.tokens) or request.label not in incomplete:
            flips[request.label] = flip
    return flips


def logprob_difference(
    golden: Request, candidate: Request, index: int
) -> tuple[float, bool]:
    """Difference of the log-probability of the golden's token, at one position.

    Returns:
        The absolute difference, and whether it is only a lower bound because the
        token is not among the candidate's best.
    """
    token, old = golden.tokens[index], float(golden.logprobs[index])
    if candidate.tokens[index] == token:
        return _difference(old, float(candidate.logprobs[index])), False
    best = {i: float(value) for i, value in candidate.top[index]}
    if token in best:
        return _difference(old, best[token]), False
    if math.isnan(old) or any(map(math.isnan, best.values())):
        return math.inf, False
    least = min(best.values(), default=-math.inf)
    return max(0.0, old - least), True


def _difference(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    difference = abs(a - b)
    return math.inf if math.isnan(difference) else difference


def own_flips(
    golden: Sequence[Request], candidate: Sequence[Request]
) -> dict[int, list[int]]:
    """Numbers of the tokens that requests, fed the golden's, would have sampled else.

    Args:
        golden: Requests of the golden.
        candidate: Requests of the candidate.
    """
    here = {request.label: request.own for request in candidate if request.own}
    return {
        request.label: [
            index
            for index, (a, b) in enumerate(
                zip(request.tokens, here[request.label], strict=False)
            )
            if a != b
        ]
        for request in golden
        if request.label in here
    }


def _own_difference(golden: Request, candidate: Request, index: int) -> float:
    """Least difference of the log-probability of the token that it sampled itself."""
    token = candidate.own[index]
    new = {i: float(value) for i, value in candidate.top[index]}.get(token)
    old = {i: float(value) for i, value in golden.top[index]}
    if new is None:
        return 0.0
    if token in old:
        return _difference(old[token], new)
    if math.isnan(new) or any(map(math.isnan, old.values())):
        return math.inf
    return max(0.0, new - min(old.values(), default=-math.inf))


def compare_tokens(
    golden: Sequence[Request],
    candidate: Sequence[Request],
    allowed: float,
    *,
    limit_of: Callable[[int, int], float] | None = None,
    incomplete: Collection[int] = (),
) -> TokenDifference:
    """Greatest difference of log-probabilities and first flipped token.

    Tokens are compared up to and with the first other token of each request. There the
    candidate's token counts as well as the golden's. Where the golden's tokens were
    fed back all are compared, and the first one that it would have sampled otherwise
    is the flipped one.

    Args:
        golden: Requests of the golden.
        candidate: Requests of the candidate.
        allowed: Limit of the difference.
        limit_of: Limit for one token by request and number, where they differ; the
            difference that is greatest against its limit is then reported.
        incomplete: Labels of requests whose last tokens were not recorded.
    """
    here = {request.label: request for request in candidate}
    flips = positions_behind_flips(golden, candidate, incomplete)
    own = own_flips(golden, candidate)
    result = TokenDifference(allowed=portable(allowed))
    worst = (0.0, 0.0)
    for request in golden:
        other = here.get(request.label)
        if other is None:
            continue
        flip = flips.get(request.label)
        common = min(len(request.tokens), len(other.tokens))
        last = common if flip is None else min(flip + 1, common)
        for index in range(last):
            difference, is_bound = logprob_difference(request, other, index)
            if index == flip:
                # Where greedy tokens flip, one of the two tokens must have moved.
                back, is_back_bound = logprob_difference(other, request, index)
                if back > difference:
                    difference, is_bound = back, is_back_bound
            elif index in own.get(request.label, ()):
                difference = max(difference, _own_difference(request, other, index))
            result.compared += 1
            limit = limit_of(request.label, index) if limit_of else allowed
            found = (_times(difference, limit), difference)
            if found > worst:
                worst = found
                result.at = (request.label, index)
                result.is_at_least = is_bound
                result.allowed = portable(limit)
        forced = own.get(request.label)
        if flip is None and forced and result.flipped is None:
            result.flipped = (request.label, forced[0])
            result.golden_token = request.tokens[forced[0]]
            result.token = other.own[forced[0]]
        if flip is not None and result.flipped is None:
            result.flipped = (request.label, flip)
            if flip < common:
                result.golden_token = request.tokens[flip]
                result.token = other.tokens[flip]
    result.largest = portable(worst[1])
    return result


def _times(difference: float, limit: float) -> float:
    """Difference / limit; an infinite difference is worse than anything."""
    if difference == 0.0 or math.isinf(difference):
        return difference
    return difference / limit if limit > 0 else math.inf
