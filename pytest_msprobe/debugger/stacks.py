# SPDX-License-Identifier: Apache-2.0
"""Call stacks, taken as pairs of code object and offset and turned into text later."""

from types import FrameType

from pytest_msprobe.model.calls import Frame


def capture_stack(frame: FrameType | None, stop: FrameType | None) -> tuple[Frame, ...]:
    """Frames from `frame` outwards, up to but without `stop`.

    Args:
        frame: The caller's frame.
        stop: The frame outside of which the stack is common to the step.
    """
    frames: list[Frame] = []
    while frame is not None and frame is not stop:
        frames.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(frames)
