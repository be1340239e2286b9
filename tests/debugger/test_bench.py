# SPDX-License-Identifier: Apache-2.0
"""bench_path and diff_nums: tensors are saved where they differ from a reference."""

import json

import pytest
import torch
from toy import Model

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.errors import CaptureError


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def record(folder, model, steps=1, task="tensor", level="mix", **section):
    """Dumps some steps of a model; returns the debugger."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    config = {"task": task, "level": level, "dump_path": str(folder / "dump")}
    path.write_text(json.dumps({**config, task: {"summary_mode": "md5", **section}}))
    debugger = PrecisionDebugger(config_path=str(path))
    with torch.no_grad():
        for _ in range(steps):
            debugger.start(model=model, rank_id=0)
            model(torch.arange(5))
            debugger.stop()
            debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    return debugger


def saved(folder):
    """Files of tensors, and the rows that name them, of all steps."""
    files, named = [], []
    for rank in sorted((folder / "dump").glob("step*/rank0")):
        files += [p.name for p in (rank / "dump_tensor_data").glob("*.pt")]
        named += _names(json.loads((rank / "dump.json").read_text())["data"])
    return sorted(files), sorted(named)


def _names(value):
    if isinstance(value, dict) and "data_name" in value:
        return [value["data_name"]]
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return []
    return [name for item in items for name in _names(item)]


@pytest.fixture
def reference(tmp_path):
    """A dump with checksums of two steps of the toy model."""
    record(tmp_path / "reference", Model(), steps=2, task="statistics")
    return tmp_path / "reference" / "dump"


@pytest.fixture
def fault():
    """A model whose second block computes something else."""
    model = Model()
    factor = model.blocks[1].scale.factor
    before = factor.detach().clone()
    with torch.no_grad():
        factor.add_(0.5)
    assert not torch.equal(before, factor)
    return model


def test_equal_runs_save_nothing(tmp_path, reference):
    """Where all checksums are those of the reference no tensor is written."""
    record(tmp_path / "run", Model(), steps=2, bench_path=str(reference))

    assert saved(tmp_path / "run") == ([], [])


@pytest.mark.parametrize("task", ["tensor", "diff_check"])
def test_the_first_difference_is_saved(tmp_path, reference, fault, task):
    """The module that made the difference has its tensors saved, with equal names."""
    model = fault
    debugger = record(
        tmp_path / "run", model, task=task, level="L0", bench_path=str(reference)
    )

    files, named = saved(tmp_path / "run")
    name = "Module.blocks.1.scale.Scale.forward.0"
    assert files == named
    assert {file.rpartition(".forward.0")[0] for file in files} == {
        name.removesuffix(".forward.0")
    }
    rank = tmp_path / "run" / "dump" / "step0" / "rank0"
    output = torch.load(rank / "dump_tensor_data" / f"{name}.output.0.pt")
    inputs = torch.load(rank / "dump_tensor_data" / f"{name}.input.0.pt")
    assert torch.equal(output, inputs * model.blocks[1].scale.factor.detach())
    assert debugger._recorder.is_finished


def test_inputs_are_saved_as_they_were(tmp_path):
    """The saved input of a call that writes in place is what went in."""

    class Adds(torch.nn.Module):
        def __init__(self, amount):
            super().__init__()
            self.amount = amount

        def forward(self, ids):
            x = ids.float()
            x.add_(self.amount)
            return x

    record(tmp_path / "a", torch.nn.Sequential(Adds(1)), task="statistics", level="L1")
    record(
        tmp_path / "b",
        torch.nn.Sequential(Adds(2)),
        level="L1",
        bench_path=str(tmp_path / "a" / "dump"),
    )

    folder = tmp_path / "b" / "dump" / "step0" / "rank0" / "dump_tensor_data"
    before = torch.load(folder / "Tensor.add_.0.forward.input.0.pt")
    after = torch.load(folder / "Tensor.add_.0.forward.output.0.pt")
    assert before.tolist() == [0, 1, 2, 3, 4]
    assert after.tolist() == [2, 3, 4, 5, 6]


def test_recording_ends_after_so_many_differences(tmp_path, reference, fault):
    """With diff_nums 1 the second step is not recorded, with -1 it is."""
    record(tmp_path / "one", fault, steps=2, bench_path=str(reference))
    record(tmp_path / "all", fault, steps=2, bench_path=str(reference), diff_nums=-1)

    assert [p.name for p in (tmp_path / "one" / "dump").glob("step*")] == ["step0"]
    assert len(list((tmp_path / "all" / "dump").glob("step*"))) == 2


def test_a_step_that_the_reference_lacks_is_an_error(tmp_path, reference):
    """Start says which folder of the reference is missing."""
    with pytest.raises(CaptureError, match="step2"):
        record(tmp_path / "run", Model(), steps=3, bench_path=str(reference))
