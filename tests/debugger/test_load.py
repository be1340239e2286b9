# SPDX-License-Identifier: Apache-2.0
"""load: inputs of modules are those of an earlier dump."""

import json

import pytest
import torch
from toy import Model

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.errors import CaptureError

CALL = "Module.blocks.1.Block.forward.0"


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def run(folder, ids, **config):
    """One step of the toy model under a configuration; its result and the debugger."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    data = {"dump_path": str(folder / "dump"), "level": "L0", **config}
    path.write_text(json.dumps(data))
    debugger = PrecisionDebugger(config_path=str(path))
    model = Model()
    with torch.no_grad():
        debugger.start(model=model, rank_id=0)
        result = model(ids)
        debugger.stop()
        debugger.step()
    PrecisionDebugger.reset()
    return result, debugger


@pytest.fixture
def earlier(tmp_path):
    """An earlier dump with tensors, and what the model gave there."""
    result, _ = run(tmp_path / "earlier", torch.arange(5), task="tensor")
    return tmp_path / "earlier" / "dump", result


def test_a_module_gets_the_inputs_of_the_dump(tmp_path, earlier):
    """With the second block's inputs loaded other ids give the earlier result."""
    folder, result = earlier
    other = torch.tensor([9, 8, 7, 6, 5])
    plain, _ = run(tmp_path / "plain", other)
    load = {"path": str(folder), "modules": [CALL]}

    loaded, debugger = run(tmp_path / "loaded", other, load=load)

    assert not torch.equal(plain, result)
    assert torch.equal(loaded, result)
    assert debugger.error is None
    assert not (tmp_path / "loaded" / "dump").exists()


def test_the_run_is_dumped_if_it_is_to_be(tmp_path, earlier):
    """With dump_after_load the dump shows the loaded inputs."""
    folder, _ = earlier
    load = {"path": str(folder), "modules": [CALL], "dump_after_load": True}

    run(tmp_path / "loaded", torch.tensor([9, 8, 7, 6, 5]), load=load)

    def inputs(dump):
        path = dump / "step0" / "rank0" / "dump.json"
        return json.loads(path.read_text())["data"][CALL]["input_args"][0]["Norm"]

    assert inputs(tmp_path / "loaded" / "dump") == inputs(folder)


@pytest.mark.parametrize(
    ("modules", "ids", "text"),
    [
        ([CALL], [1, 2], "the call has"),
        (["Module.embed.Embedding.forward.0"], [1, 2], "the call has"),
    ],
)
def test_inputs_of_another_form_stop_the_recording(
    tmp_path, earlier, modules, ids, text
):
    """A tensor of another shape is an error; the model itself goes on."""
    folder, _ = earlier
    load = {"path": str(folder), "modules": modules}

    result, debugger = run(tmp_path / "loaded", torch.tensor(ids), load=load)

    assert result.shape[0] == len(ids)
    assert text in str(debugger.error)


def test_a_call_that_never_came_is_said(tmp_path, earlier, caplog):
    """A listed call that was not made is named at the end."""
    folder, _ = earlier
    name = "Module.nothing.Block.forward.0"

    run(tmp_path / "b", torch.arange(5), load={"path": str(folder), "modules": [name]})

    assert f"never called: {name}" in caplog.text


def test_a_dump_without_tensors_is_refused(tmp_path):
    """Start says where tensors were expected."""
    run(tmp_path / "earlier", torch.arange(5))
    load = {"path": str(tmp_path / "earlier" / "dump"), "modules": [CALL]}

    with pytest.raises(CaptureError, match="no dump with tensors"):
        run(tmp_path / "loaded", torch.arange(5), load=load)
