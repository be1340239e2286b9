# SPDX-License-Identifier: Apache-2.0
"""The debugger on a GPU without an engine: gradients, nan_check, save, slice, bench.

pytest tests/cuda/test_cuda_debugger.py -p no:cacheprovider
"""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch missing")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

from toy import Model  # noqa: E402

from pytest_msprobe import PrecisionDebugger  # noqa: E402


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def made(folder, task="statistics", section=None, **general):
    """A debugger that dumps into a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    config = {"task": task, "dump_path": str(folder / "dump"), **general}
    path.write_text(json.dumps({**config, task: section or {}}))
    return PrecisionDebugger(config_path=str(path))


def step(debugger, model, ids=None, *, backward=False):
    """One step of the toy model on the GPU."""
    ids = torch.arange(5, device="cuda") if ids is None else ids
    debugger.start(model=model, rank_id=0)
    result = model(ids)
    if backward:
        result.square().sum().backward()
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None


def read(folder, name="dump.json"):
    """Content of a file of the one step."""
    return json.loads((folder / "dump" / "step0" / "rank0" / name).read_text())


@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_gradients_are_autograds(tmp_path, task):
    """Gradients of parameters, read in autograd's own thread, are what is there."""
    model = Model().cuda()
    step(made(tmp_path, task, level="mix"), model, backward=True)

    data = read(tmp_path)["data"]
    for name, path in (
        ("embed.Embedding", "embed"),
        ("blocks.0.proj.Linear", "blocks.0.proj"),
    ):
        found = data[f"Module.{name}.parameters_grad.0"]["weight"][0]
        gradient = model.get_submodule(path).weight.grad.double()
        assert found["Norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert found["Max"] == pytest.approx(gradient.max().item())
    assert "Functional.linear.1.backward" in data
    assert "Module.blocks.1.Block.backward.0" in data


def test_the_first_nonfinite_result_is_named(tmp_path):
    """nan_check names the call on a GPU too."""
    model = Model().cuda()
    with torch.no_grad():
        model.blocks[1].proj.bias[0] = float("inf")
    step(made(tmp_path, "nan_check", level="L0"), model)

    first = read(tmp_path)["first_nonfinite"]
    assert first["name"] == "Module.blocks.1.proj.Linear.forward.0"
    assert first["has_finite_inputs"]


def test_saved_variables_have_their_numbers(tmp_path):
    """Values and gradients of saved variables are those of the tensors."""
    debugger = made(tmp_path, level="debug")
    x = torch.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    debugger.start(rank_id=0)
    debugger.save(x * 3, "y")
    y = x * 2
    debugger.save(y, "z")
    y.square().sum().backward()
    debugger.step()

    data = read(tmp_path, "debug.json")["data"]
    assert data["y.0.debug"]["Max"] == 6.0
    assert data["z_grad.0.debug"]["Max"] == 8.0


@pytest.mark.parametrize("mode", ["statistics", "md5", "xor"])
def test_slices_and_checksums(tmp_path, mode):
    """What is cut and summed on the GPU is what a copy on the CPU gives."""
    section = {"summary_mode": mode, "slice": [{"dim": 0, "begin": 1, "end": 3}]}
    model = Model()
    step(made(tmp_path / "cpu", section=section, level="L0"), model, torch.arange(5))
    step(made(tmp_path / "gpu", section=section, level="L0"), model.cuda())

    name = "Module.embed.Embedding.forward.0"
    cpu, gpu = (read(tmp_path / side)["data"][name] for side in ("cpu", "gpu"))
    assert gpu["output"][0]["shape"] == [2, 8]
    if mode == "statistics":
        assert gpu["output"][0]["Norm"] == pytest.approx(cpu["output"][0]["Norm"])
    else:
        assert gpu["output"][0]["md5"] == cpu["output"][0]["md5"]
