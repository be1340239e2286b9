# SPDX-License-Identifier: Apache-2.0
"""Whether two captures can be compared at all, and what else differs between them."""

from collections.abc import Iterable
from typing import Any

from pytest_msprobe.dump.capture import DUMP, CaptureFile, Header, StepLine


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differences(
    golden: dict[str, Any], candidate: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, with the golden's and the candidate's value."""
    a, b = flatten(golden), flatten(candidate)
    return [
        (key, a.get(key), b.get(key))
        for key in [*a, *(key for key in b if key not in a)]
        if a.get(key) != b.get(key)
    ]


def incomparable_reasons(golden: Header, candidate: Header) -> list[str]:
    """Why two captures cannot be compared; empty if they can."""
    if DUMP in (golden.kind, candidate.kind):
        return []  # a dump says nothing of how it was made
    reasons = [
        f"{key}: golden {old!r}, here {new!r}"
        for key, old, new in differences(golden.signature, candidate.signature)
    ]
    if golden.world != candidate.world:
        reasons.append(f"ranks: golden {golden.world}, here {candidate.world}")
    here = {request.label: request for request in candidate.requests}
    for request in golden.requests:
        other = here.get(request.label)
        if other is None:
            reasons.append(f"request {request.label}: was not scheduled here")
        elif other.prompt_sha256 != request.prompt_sha256:
            reasons.append(
                f"request {request.label}: another prompt (golden "
                f"{request.prompt_tokens} tokens, here {other.prompt_tokens})"
            )
    known = {request.label for request in golden.requests}
    reasons.extend(
        f"request {label}: not in the golden" for label in here if label not in known
    )
    return reasons


def first_positions(steps: Iterable[StepLine]) -> dict[int, int]:
    """Position at which each request's prompt was begun; above 0 after a cache hit."""
    found: dict[int, int] = {}
    for step in steps:
        for label, _tokens, position in step.requests:
            found[label] = min(position, found.get(label, position))
    return found


def prefix_reasons(golden: CaptureFile, candidate: CaptureFile) -> list[str]:
    """Requests of which the two captures computed another part of the prompt."""
    before, now = first_positions(golden.steps), first_positions(candidate.steps)
    return [
        f"request {label}: rows missing: its prompt was computed from position "
        f"{now[label]} on (golden: {position}), the rest came from the prefix cache; "
        "set enable_prefix_caching to false"
        for label, position in before.items()
        if now.get(label, position) != position
    ]
