# SPDX-License-Identifier: Apache-2.0
"""Where requests were batched or chunked differently than in the golden.

Each request is followed through the steps that both captures have of it, up to its
first flipped token. It is *moved* from the first step on that computes another chunk of
it, or computes it together with others. That one side has more steps is no difference.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_msprobe.dump.capture import CaptureFile, StepLine
from pytest_msprobe.model.segments import FIRST, PROMPT, segment_name

# What a step computes: tokens, then (request, tokens, first position) in row order.
Batch = tuple[object, ...]


def _batch(step: StepLine) -> Batch:
    return (step.tokens, *step.requests)


@dataclass(slots=True)
class Schedule:
    """How a candidate's steps relate to the golden's.

    Attributes:
        flips: Number of the first flipped token, by request.
        prompts: Length of each request's prompt.
        moved: Position from which on a request was scheduled differently.
        equal_steps: Steps in which both computed the same, all of it comparable.
        needed_steps: Steps of the golden that the candidate should have as well.
        behind_steps: Steps of the candidate that compute something behind a flip.
    """

    flips: Mapping[int, int]
    prompts: Mapping[int, int]
    moved: dict[int, int] = field(default_factory=dict)
    equal_steps: set[int] = field(default_factory=set)
    needed_steps: set[int] = field(default_factory=set)
    behind_steps: set[int] = field(default_factory=set)

    def is_behind(self, segment: str) -> bool:
        """Whether a segment lies behind its request's first flipped token."""
        label, part = _parts(segment)
        flip = self.flips.get(label)
        return flip is not None and part.startswith("g") and int(part[1:]) > flip

    def is_flip(self, segment: str) -> bool:
        """Whether a request's first flipped token is sampled from this segment."""
        label, _ = _parts(segment)
        flip, prompt = self.flips.get(label), self.prompts.get(label, 0)
        if flip is None or not prompt:
            return False
        return segment == segment_name(label, prompt - 1 + flip, prompt)

    def is_moved(self, segment: str) -> bool:
        """Whether a segment was computed under another scheduling."""
        label, part = _parts(segment)
        position = self.moved.get(label)
        if position is None:
            return False
        if part == FIRST:
            return position == 0
        prompt = self.prompts.get(label)
        if prompt is None:
            return True
        last = prompt - 1
        return last + (0 if part == PROMPT else int(part[1:])) >= position

    def is_token_moved(self, label: int, number: int) -> bool:
        """Whether a generated token was computed under another scheduling."""
        position = self.moved.get(label)
        return position is not None and self._position(label, number) >= position

    def _position(self, label: int, number: int) -> int:
        """Position whose forward a generated token is sampled from."""
        return self.prompts.get(label, 1) - 1 + number

    def is_position_behind(self, label: int, position: int) -> bool:
        """Whether a position lies behind the request's first flipped token."""
        flip = self.flips.get(label)
        return flip is not None and position > self._position(label, flip)

    def is_step_behind(self, step: StepLine) -> bool:
        """Whether a step computes anything behind a flipped token."""
        return any(
            self.is_position_behind(label, position + rows - 1)
            for label, rows, position in step.requests
        )

    def is_step_moved(self, step: StepLine) -> bool:
        """Whether a step computes anything that was scheduled differently."""
        return any(
            label in self.moved and position + rows > self.moved[label]
            for label, rows, position in step.requests
        )


def _parts(segment: str) -> tuple[int, str]:
    """Label and part of a segment's name; label -1 for padding and whole tensors."""
    label, _, part = segment.partition(".")
    return (int(label), part) if label.isdigit() and part else (-1, part)


def _by_request(capture: CaptureFile) -> dict[int, list[tuple[int, Batch]]]:
    """For each request the positions at which its steps begin, and their batches."""
    found: dict[int, list[tuple[int, Batch]]] = defaultdict(list)
    for step in capture.steps:
        batch = _batch(step)
        for label, _, position in step.requests:
            found[label].append((position, batch))
    return found


def compare_schedules(
    golden: CaptureFile, candidate: CaptureFile, flips: Mapping[int, int]
) -> Schedule:
    """Follows every request through both captures.

    Args:
        golden: The golden.
        candidate: The candidate.
        flips: Number of the first flipped token, by request.
    """
    prompts = {r.label: r.prompt_tokens for r in golden.header.requests}
    result = Schedule(flips, prompts)
    here = _by_request(candidate)
    for label, steps in _by_request(golden).items():
        for (a, old), (b, new) in zip(steps, here.get(label, []), strict=False):
            position = min(a, b)
            if result.is_position_behind(label, position):
                break
            if old != new:
                result.moved[label] = position
                break
    result.behind_steps = {
        step.step for step in candidate.steps if result.is_step_behind(step)
    }
    other = {step.step: _batch(step) for step in candidate.steps}
    batches = set(other.values())
    for step in golden.steps:
        if result.is_step_behind(step) or result.is_step_moved(step):
            continue
        batch = _batch(step)
        if other.get(step.step) == batch:
            result.equal_steps.add(step.step)
            result.needed_steps.add(step.step)
        elif batch not in batches:
            result.needed_steps.add(step.step)
    return result
