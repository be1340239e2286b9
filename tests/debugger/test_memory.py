# SPDX-License-Identifier: Apache-2.0
"""Who wrote a tensor's memory, and when it is measured again."""

import json
import threading

import pytest
import torch

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.assemble import assemble
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.model.segments import RequestRows, SampleRow, StepLayout


class Writer(torch.nn.Module):
    """Writes its result into an argument and returns nothing, as mixers do."""

    def forward(self, x, out):
        out.copy_(x * 2)


class Caller(torch.nn.Module):
    """Hands memory nobody has written to a child that writes it."""

    def __init__(self):
        super().__init__()
        self.writer = Writer()

    def forward(self, x):
        out = torch.empty_like(x)
        out.view(torch.int32).fill_(0x7FC00000)
        self.writer(x, out)
        return out


class Hidden(torch.nn.Module):
    """Fills memory by means that no function mode sees."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.inner = torch.nn.Identity()

    def forward(self, x):
        out = torch.empty(x.shape[0], 2 * x.shape[1])
        if self.way == "out":
            torch.cat([x, x], 1, out=out)
        else:
            out.numpy()[:] = 1.0
        return self.inner(out)


class Holder(torch.nn.Module):
    """Passes a buffer and a weight to a child."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.ones(4))
        self.child = torch.nn.Identity()

    def forward(self, x):
        return x + self.child(self.state)


class Overwriter(torch.nn.Module):
    """Overwrites what its child gave, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.child = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.child(x).mul_(3.0)


pytestmark = pytest.mark.usefixtures("ways")


def run(tmp_path, model, inputs, *, level="mix", between=None, call=None):
    """Records two forwards of a model; returns the recorder's steps."""
    root = torch.nn.Sequential(model)
    config = DebuggerConfig(level=level, risk_level="ALL")
    recorder = Recorder(config, tmp_path, rank=0, is_kept=True, is_deferred=True)
    recorder.attach(root)
    for step in range(2):

        def forward(step=step):
            recorder.begin_step(step)
            with recorder.recording, torch.inference_mode():
                root(inputs)
            recorder.end_step()

        forward() if call is None else call(forward)
        if between is not None and step == 0:
            between(model)
    return recorder.close()


def call_of(step, name):
    """The record of the call whose name holds a text."""
    return next(call for call in step.calls if name in call.name)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_a_module_without_a_result_has_what_it_wrote_as_output(tmp_path, level):
    """Arguments written by a module that returns nothing are outputs, not inputs."""
    steps = run(tmp_path, Caller(), torch.arange(6.0).reshape(2, 3), level=level)
    call = call_of(steps[0], "Module.0.writer.")

    (written,) = call.output
    assert written.rows[0, 0] == 10.0
    assert call.input_args[1].role == "undefined"
    assert call.input_args[0].role == "read"


@pytest.mark.parametrize("way", ["out", "numpy"])
def test_what_a_module_returns_counts_as_written(tmp_path, way):
    """Memory filled behind the mode's back is judged as soon as a module returns it."""
    steps = run(tmp_path, Hidden(way), torch.ones(2, 3))

    assert call_of(steps[0], "Module.0.Hidden.").output[0].role == "read"
    if way == "out":
        assert call_of(steps[0], "Module.0.inner.").input_args[0].role == "read"


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_a_changed_buffer_is_measured_again(tmp_path, level):
    """A buffer or parameter written between two steps shows its new numbers."""

    def change(model):
        with torch.no_grad():
            model.state.add_(1.0)

    steps = run(tmp_path, Holder(), torch.ones(4), level=level, between=change)

    maxima = [
        call_of(step, "Module.0.child.").input_args[0].rows[0, 0] for step in steps
    ]
    assert maxima == [1.0, 2.0]


def test_a_changed_weight_is_measured_again(tmp_path):
    """Parameters are measured once until somebody writes them."""

    def change(model):
        with torch.no_grad():
            model.weight.add_(10.0)

    model = torch.nn.Linear(3, 3)
    steps = run(tmp_path, model, torch.ones(2, 3), level="L0", between=change)

    before, after = (
        call_of(step, "Linear").parameters["weight"].rows[0, 0] for step in steps
    )
    assert after == pytest.approx(before + 10.0)


def in_a_thread(function):
    """Calls a function in a thread of its own."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_a_model_may_run_in_another_thread(tmp_path, level):
    """A result is read before it is overwritten, whichever thread runs the model."""
    model, inputs = Overwriter(), torch.ones(2, 4)
    expected = model.child(inputs).max().item()

    for call in (None, in_a_thread):
        for step in run(tmp_path, model, inputs, level=level, call=call):
            (result,) = call_of(step, ".child.").output
            assert result.rows[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_a_model_may_run_in_another_thread_than_start(tmp_path, level):
    """Its modules and functions are recorded, each result before it is overwritten."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(Overwriter()), torch.ones(2, 4)
    expected = model[0].child(inputs).max().item()
    PrecisionDebugger.reset()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level=level)
    for _ in range(2):
        debugger.start(model=model)
        torch.exp(inputs)
        in_a_thread(lambda: model(inputs))
        in_a_thread(lambda: torch.exp(inputs))
        torch.exp(inputs)
        debugger.stop()
        debugger.step()
    PrecisionDebugger.reset()

    for path in tmp_path.rglob("dump.json"):
        data = json.loads(path.read_text())["data"]
        (result,) = data["Module.0.child.Linear.forward.0"]["output"]
        assert result["Max"] == pytest.approx(expected)
        if level == "mix":
            assert list(data) == [
                "Torch.exp.0.forward",
                "Functional.linear.0.forward",
                "Module.0.child.Linear.forward.0",
                "Tensor.mul_.0.forward",
                "Module.0.Overwriter.forward.0",
                "Torch.exp.1.forward",
            ]


class Pooling(torch.nn.Module):
    """A model whose pooler its runner calls after the forward."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.pooler = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.body(x)


def test_modules_called_behind_the_forward_are_in_the_capture(tmp_path):
    """A pooler is judged, the runner's own operators around it are not."""
    model = Pooling()
    config = DebuggerConfig(level="mix", risk_level="ALL")
    recorder = Recorder(config, tmp_path, rank=0, is_kept=True, is_deferred=True)
    recorder.attach(model)
    layout = StepLayout(
        3, 3, (RequestRows(0, 0, 3, 0, 3),), (SampleRow(0, 2, 3, is_defined=True),)
    )
    recorder.begin_step(0, layout_source=lambda _padded: layout)
    with recorder.recording, torch.inference_mode():
        hidden = model(torch.ones(3, 4) * 0.5)
        hidden = hidden + 1
        model.pooler(hidden[-1:])
    recorder.end_step()

    assembly = assemble(recorder.close())

    calls = {line.c: line for line in assembly.lines if hasattr(line, "c")
             and hasattr(line, "o")}  # fmt: skip
    assert "Module.pooler.Linear.forward.0" in calls
    assert "Functional.linear.1.forward" in calls  # inside the pooler
    assert not any("add" in name for name in calls)
    tensors = {line.t: line for line in assembly.lines if hasattr(line, "t")}
    (output,) = calls["Module.pooler.Linear.forward.0"].o["output.0"]
    assert tensors[output].row_class == "sample"
