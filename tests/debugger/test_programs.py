# SPDX-License-Identifier: Apache-2.0
"""Programs that write in every way are recorded alike, noted or call by call."""

import ctypes

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.model.segments import RequestRows, StepLayout

POOL = 3
# Rows of the steps: once the tensors have other rows, which is remembered.
ROWS = (4, 4, 3, 4)
KINDS = (
    "empty add add_ part out copy module hidden mixed relu relu_inplace "
    "threshold_inplace apart"
).split()

places = st.integers(0, POOL - 1)
programs = st.lists(st.tuples(st.sampled_from(KINDS), places, places), max_size=14)
# What was given before anybody wrote it is written more than once.
WRITTEN_AGAIN = [("empty", 0, 0), ("add_", 0, 0), ("add_", 0, 0)]


def unwritten():
    """Memory that nobody is seen to write, with numbers that are always the same."""
    made = torch.empty(4)
    (ctypes.c_float * 4).from_address(made.data_ptr())[:] = [7.0] * 4
    return made


class Program(torch.nn.Module):
    """Runs operations on a few tensors, some of which share memory."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations
        self.child = torch.nn.Identity()

    def forward(self, x):
        pool = [x.add(index - 2) for index in range(POOL)]
        for number, (kind, i, j) in enumerate(self.operations):
            getattr(self, kind)(pool, i, j, number)
        return pool[0]

    def empty(self, pool, i, _j, _number):
        pool[i] = unwritten()

    def add(self, pool, i, j, number):
        pool[j] = pool[i].add(number)

    def add_(self, pool, i, _j, number):
        pool[i].add_(number)

    def part(self, pool, i, j, _number):
        pool[j] = pool[i][1:]

    def out(self, pool, i, j, number):
        alike = pool[i].shape == pool[j].shape
        if alike and not torch._C._is_alias_of(pool[i], pool[j]):
            torch.add(pool[i], number, out=pool[j])

    def copy(self, pool, i, _j, number):
        pool[i].copy_(torch.full((), float(number)))

    def relu(self, pool, i, j, _number):
        pool[j] = torch.nn.functional.relu(pool[i])

    def relu_inplace(self, pool, i, j, _number):
        pool[j] = torch.nn.functional.relu(pool[i], inplace=True)

    def threshold_inplace(self, pool, i, _j, number):
        torch.nn.functional.threshold(pool[i], 1.0, -number, inplace=True)

    def apart(self, pool, i, j, _number):
        size = len(pool[i])
        made = pool[i].repeat(3)
        pool[i], pool[j] = made[:size].add_(1), made[2 * size :].add_(2)

    def module(self, pool, i, j, _number):
        pool[j] = self.child(pool[i])

    def hidden(self, pool, _i, j, _number):
        pool[j] = self.child(unwritten())

    def mixed(self, pool, i, j, _number):
        made = unwritten()
        torch.mul(pool[i], 2, out=made[: len(pool[i])])
        pool[j] = made.add(made[:1])


def recorded(folder, program, *, has_gradients, level, hooks="mode"):
    """Names, roles and numbers of all steps."""
    config = DebuggerConfig(level=level, risk_level="ALL", function_hooks=hooks)
    recorder = Recorder(
        config,
        folder,
        rank=0,
        is_kept=True,
        is_deferred=True,
        has_gradients=has_gradients,
    )
    model = torch.nn.Sequential(Program(program))
    recorder.attach(model)
    functions = torch.Tensor.add, torch.add, torch.empty
    for number, rows in enumerate(ROWS):
        layout = StepLayout(rows, rows, (RequestRows(0, 0, rows, 0, 3),))
        recorder.begin_step(number, layout_source=lambda _rows, found=layout: found)
        with recorder.recording, torch.inference_mode():
            model(torch.arange(4.0) + number)
        recorder.end_step()
    steps = recorder.close()
    recorder.detach()
    assert hooks == "mode" or functions != (torch.Tensor.add, torch.add, torch.empty)
    return [[shown(call) for call in step.calls] for step in steps]


def shown(call):
    sides = (*call.input_args, *call.input_kwargs.values(), *(call.output or ()))
    return (call.name, *(leaf(value) for value in sides))


def leaf(value):
    if not hasattr(value, "role"):
        return value
    rows = None
    if value.role == "read" and value.rows is not None:
        rows = value.rows.tobytes()
    return value.role, value.shape, rows


@pytest.mark.parametrize("level", ["L1", "mix"])
@settings(max_examples=25, deadline=None)
@given(program=programs)
@example(program=WRITTEN_AGAIN)
def test_noted_calls_are_recorded_as_those_read_at_once(
    tmp_path_factory, level, program
):
    """Roles and numbers do not depend on when what was noted is read."""
    folder = tmp_path_factory.mktemp("dump")

    noted, at_once = (
        recorded(folder / str(way), program, has_gradients=way, level=level)
        for way in (False, True)
    )

    assert noted == at_once
    assert noted == recorded(
        folder / "replaced", program, has_gradients=False, level=level, hooks="replace"
    )


def test_memory_nobody_wrote_is_shown_without_numbers(tmp_path):
    """Of memory that an operator is about to fill the form alone is recorded."""
    steps = recorded(tmp_path, [("mixed", 0, 1)], has_gradients=False, level="mix")

    for calls in steps:
        (mul,) = (call for call in calls if call[0].startswith("Torch.mul."))
        assert mul[3] == ("undefined", (4,), None)
        assert mul[4][0] == "read"
