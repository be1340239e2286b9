# SPDX-License-Identifier: Apache-2.0
"""Turns the raw records of a step into plain ones, off the hot path."""

from collections.abc import Iterator

from pytest_msprobe.debugger.measure import Measured, to_value
from pytest_msprobe.debugger.raw import RawCall, RawStep
from pytest_msprobe.model.calls import CallRecord, Scalar, StepRecord, Tree


def materialize(step: RawStep) -> StepRecord:
    """The plain records of a step."""
    return StepRecord(
        step.step,
        step.layout,
        [_call(call, step) for call in _calls(step)],
        step.common_stack,
    )


def _calls(step: RawStep) -> Iterator[RawCall]:
    """All calls, in the order in which they ended."""
    running: dict[int, RawCall] = {}
    for item in step.calls:
        if isinstance(item, RawCall):
            yield item
        else:
            yield from item.calls(running)
    # What began in this step ends in no other: a record of its inputs, innermost first.
    yield from reversed(running.values())


def _call(call: RawCall, step: RawStep) -> CallRecord:
    return CallRecord(
        call.name,
        call.key or call.name,
        call.depth,
        call.parent.name if call.parent is not None else call.region or None,
        _tree(call.input_args, step),
        _tree(call.input_kwargs, step),
        _tree(call.output, step),
        _tree(call.parameters, step),
        call.stack,
        call.phase,
        call.kind,
    )


def _tree(tree: Tree, step: RawStep) -> Tree:
    # Measured is a tuple and Scalar a dict, so they are asked for first.
    if isinstance(tree, Measured):
        return to_value(tree, step.token_pieces, step.sample_pieces)
    if isinstance(tree, list):
        return [_tree(item, step) for item in tree]
    if isinstance(tree, dict) and not isinstance(tree, Scalar):
        return {key: _tree(item, step) for key, item in tree.items()}
    return tree
