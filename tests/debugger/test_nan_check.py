# SPDX-License-Identifier: Apache-2.0
"""Task nan_check: the first NaN or Inf with its stack."""

import json

import pytest
import torch

from pytest_msprobe import PrecisionDebugger


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


class Breaks(torch.nn.Module):
    """Divides by what it gets: zeros make it infinite."""

    def forward(self, x):
        return 1.0 / x


def check(folder, x, task="nan_check", level="mix"):
    """Dump of one step of a model whose middle module can break."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.ReLU(), Breaks(), torch.nn.Linear(4, 4))
    debugger = PrecisionDebugger(dump_path=str(folder), task=task, level=level)
    debugger.start(model=model)
    with torch.no_grad():
        model(x)
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    (rank,) = (folder / "step0").iterdir()
    return json.loads((rank / "dump.json").read_text())


@pytest.mark.parametrize("task", ["nan_check", "overflow_check"])
def test_the_first_nonfinite_result_is_named(tmp_path, caplog, task):
    """The call that made the first Inf from finite inputs is named with its stack."""
    dump = check(tmp_path, torch.tensor([[1.0, -1.0, 2.0, -2.0]]), task)

    first = dump["first_nonfinite"]
    assert dump["task"] == "nan_check"
    assert first["name"] == "Tensor.reciprocal.0.forward"
    assert (first["nonfinite"], first["elements"]) == (2, 4)
    assert first["has_finite_inputs"]
    assert any("in forward" in line and "1.0 / x" in line for line in first["stack"])
    assert (
        "first NaN or Inf: Tensor.reciprocal.0.forward output.0: 2 of 4" in caplog.text
    )


def test_every_call_has_a_count(tmp_path):
    """is_nan counts the NaN and infinite elements of a call's results."""
    data = check(tmp_path, torch.tensor([[1.0, -1.0, 2.0, -2.0]]))["data"]

    assert data["Module.0.ReLU.forward.0"]["is_nan"] == 0
    assert data["Module.1.Breaks.forward.0"]["is_nan"] == 2
    assert data["Module.2.Linear.forward.0"]["is_nan"] == 4


def test_a_finite_step_has_no_finding(tmp_path, caplog):
    """Where all is finite nothing is named."""
    dump = check(tmp_path, torch.ones(1, 4))

    assert dump["first_nonfinite"] is None
    assert all(call["is_nan"] == 0 for call in dump["data"].values())
    assert "NaN" not in caplog.text


def test_inputs_that_are_nan_already_are_told(tmp_path):
    """A NaN that came from outside is named at its first result, and marked."""
    first = check(tmp_path, torch.full((1, 4), float("nan")), level="L0")

    assert first["first_nonfinite"]["name"] == "Module.0.ReLU.forward.0"
    assert not first["first_nonfinite"]["has_finite_inputs"]


def test_memory_that_nobody_wrote_is_not_counted(tmp_path):
    """What torch.empty holds is no finding, whatever it is."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), task="nan_check", level="L1")
    debugger.start()
    holder = torch.empty(4)
    holder.view(torch.int32)[:] = 0x7FC00000
    torch.add(torch.ones(4), torch.ones(4), out=holder)
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    (rank,) = (tmp_path / "step0").iterdir()
    assert json.loads((rank / "dump.json").read_text())["first_nonfinite"] is None
