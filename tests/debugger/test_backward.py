# SPDX-License-Identifier: Apache-2.0
"""Gradients, held against autograd's own."""

import json

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint
from toy import InPlace, Model

from pytest_msprobe import PrecisionDebugger


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def tensors(folder):
    """The saved tensors of the one step, by file name without .pt."""
    (rank,) = (folder / "step0").iterdir()
    found = (rank / "dump_tensor_data").glob("*.pt")
    return {path.stem: torch.load(path) for path in found}


def record(folder, model, backward, level="mix", **section):
    """Runs one step with tensors; returns its records and the saved tensors."""
    config = {"task": "tensor", "level": level, "dump_path": str(folder / "dump")}
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "tensor": section, "risk_level": "ALL"}))
    debugger = PrecisionDebugger(config_path=str(path))
    debugger.start(model=model)
    backward(model)
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    (rank,) = (folder / "dump" / "step0").iterdir()
    return json.loads((rank / "dump.json").read_text())["data"], tensors(
        folder / "dump"
    )


class Residual(torch.nn.Module):
    """A layer whose input also goes around it, and whose output is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.layer(x)
        return x + self.relu(y) * y


def test_gradients_of_a_module_are_autograds(tmp_path):
    """Input and output gradients of a layer beside a residual are its own share."""
    model = Residual()
    x = torch.randn(3, 4, requires_grad=True)
    _, found = record(tmp_path, model, lambda m: m(x).square().sum().backward())

    y = torch.nn.functional.linear(x, model.layer.weight, model.layer.bias)
    y.retain_grad()
    active = torch.relu(y)
    (x.detach() + active * active).square().sum().backward()
    inner = y.grad @ model.layer.weight.detach()

    name = "Module.layer.Linear.backward.0"
    assert torch.allclose(found[f"{name}.input.0"], y.grad)
    assert torch.allclose(found[f"{name}.output.0"], inner)
    assert not torch.allclose(found[f"{name}.output.0"], x.grad)


def test_gradients_of_parameters_are_autograds(tmp_path):
    """parameters_grad holds each parameter's gradient after accumulation."""
    model = Model()
    ids = torch.arange(5)

    _, found = record(tmp_path, model, lambda m: m(ids).square().sum().backward())

    for module_name, name in (
        ("embed.Embedding", "weight"),
        ("blocks.0.proj.Linear", "bias"),
        ("blocks.0.shared.LayerNorm", "weight"),
        ("blocks.1.scale.Scale", "factor"),
    ):
        module = model.get_submodule(module_name.rpartition(".")[0])
        file = f"Module.{module_name}.parameters_grad.0.{name}"
        assert torch.equal(found[file], getattr(module, name).grad)


def test_gradients_of_functions_are_autograds(tmp_path):
    """A function's backward holds the gradients of its result and of its inputs."""
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor([3.0, 5.0], requires_grad=True)

    def run(_model):
        (a * b).exp().sum().backward()

    _, found = record(tmp_path, torch.nn.Identity(), run, level="L1")

    upstream = (a * b).exp().detach()
    name = "Tensor.__mul__.0.backward"
    assert torch.equal(found[f"{name}.input.0"], upstream)
    assert torch.equal(found[f"{name}.output.0"], a.grad)
    assert torch.equal(found[f"{name}.output.1"], b.grad)


def test_the_model_computes_the_same_with_hooks(tmp_path):
    """Results and gradients with recording are those without, to the last bit."""
    x = torch.randn(3, 4)

    def gradients(model):
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(Residual())
    model = Residual()
    record(tmp_path, model, lambda m: m(x).square().sum().backward())

    assert all(map(torch.equal, plain, [p.grad for p in model.parameters()]))


def test_modules_that_write_their_input_work(tmp_path):
    """In-place modules between others run unchanged, and all have a backward."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), InPlace(), torch.nn.ReLU(inplace=True)
    )
    x = torch.randn(2, 4, requires_grad=True)

    data, _ = record(tmp_path, model, lambda m: m(x).sum().backward(), level="L0")

    names = [name for name in data if ".backward." in name]
    assert names == [
        "Module.2.ReLU.backward.0",
        "Module.1.InPlace.backward.0",
        "Module.0.Linear.backward.0",
    ]


def test_a_graph_that_runs_twice_has_two_records(tmp_path):
    """A second backward of one graph and a second accumulation are numbered on."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    x = torch.randn(1, 2, requires_grad=True)

    def run(m):
        loss = m(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    data, _ = record(tmp_path, model, run, level="L0")

    assert [name for name in data if "forward" not in name] == [
        "Module.0.Linear.parameters_grad.0",
        "Module.0.Linear.backward.0",
        "Module.0.Linear.parameters_grad.1",
        "Module.0.Linear.backward.1",
    ]


@pytest.mark.parametrize(
    ("modes", "kept"),
    [
        (["all"], {"forward": True, "backward": {"input", "output"}, "grad": True}),
        (["forward"], {"forward": True, "backward": None, "grad": False}),
        (["backward"], {"forward": False, "backward": {"input", "output"}}),
        (["backward", "output"], {"forward": False, "backward": {"output"}}),
        (["input"], {"forward": True, "backward": {"input"}, "grad": True}),
    ],
)
def test_data_mode_selects_directions(tmp_path, modes, kept):
    """Directions and sides of data_mode hold for gradients too."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    x = torch.randn(1, 2, requires_grad=True)

    data, _ = record(
        tmp_path, model, lambda m: m(x).sum().backward(), level="L0", data_mode=modes
    )

    assert ("Module.0.Linear.forward.0" in data) == kept["forward"]
    backward = data.get("Module.0.Linear.backward.0")
    assert (backward and set(backward)) == kept["backward"]
    assert ("Module.0.Linear.parameters_grad.0" in data) == kept.get("grad", True)


@pytest.mark.parametrize(
    ("modes", "sides"),
    [
        (["backward"], {"backward.0.input", "backward.0.output", "grad"}),
        (["backward", "input"], {"backward.0.input", "grad"}),
        (["forward", "output"], {"forward.0.output", "forward.0.parameters"}),
        (["forward", "input"], {"forward.0.input"}),
    ],
)
@pytest.mark.parametrize("level", ["L0", "mix"])
def test_data_mode_selects_files(tmp_path, level, modes, sides):
    """A part that is not kept has no file either."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    x = torch.randn(1, 2, requires_grad=True)

    _, found = record(
        tmp_path, model, lambda m: m(x).sum().backward(), level=level, data_mode=modes
    )

    stem = "Module.0.Linear."
    files = {name.removeprefix(stem) for name in found if name.startswith(stem)}
    kept = {
        "grad" if "grad" in name else ".".join(name.split(".")[:3]) for name in files
    }
    assert kept == sides


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_list_may_name_backward_calls_alone(tmp_path, level):
    """The backward of a call whose forward is not listed is recorded."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    x = torch.randn(1, 2, requires_grad=True)
    entry = "backward" if level == "L1" else "Tanh.backward"

    data, _ = record(
        tmp_path, model, lambda m: m(x).sum().backward(), level=level, list=[entry]
    )

    names = [name for name in data if "grad" not in name]
    assert names
    assert not any("forward" in name for name in names)
    if level == "L1":
        assert names[0] == "Tensor.sum.0.backward"
        assert "Functional.linear.0.backward" in names
    else:
        assert "Module.1.Tanh.backward.0" in names


def test_hooks_on_parameters_are_taken_off(tmp_path):
    """After a capture no hook is left on a parameter."""
    model = Model()

    record(tmp_path, model, lambda m: m(torch.arange(3)).sum().backward())

    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_backward_after_stop_is_not_recorded(tmp_path):
    """What runs while recording is off leaves no record."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="mix")
    debugger.start(model=model)
    loss = model(torch.arange(3)).sum()
    debugger.stop()
    loss.backward()
    debugger.step()
    PrecisionDebugger.reset()

    (rank,) = (tmp_path / "step0").iterdir()
    names = json.loads((rank / "dump.json").read_text())["data"]
    assert not any("backward" in name or "grad" in name for name in names)


class Passes(torch.nn.Module):
    """Returns its first argument as it is, beside something computed."""

    def forward(self, x, y):
        return x, x * y


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_what_is_passed_on_unchanged_has_its_gradients(tmp_path, level):
    """A module that returns its input has the gradient once as input and as output."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Identity())
    model.append(torch.nn.Dropout(0.0))
    x = torch.randn(3, 2, requires_grad=True)

    data, found = record(
        tmp_path, model, lambda m: m(x).square().sum().backward(), level
    )

    upstream = 2 * model(x).detach()
    for name in ("Module.2.Dropout.backward.0", "Module.1.Identity.backward.0"):
        assert torch.allclose(found[f"{name}.input.0"], upstream)
        assert torch.allclose(found[f"{name}.output.0"], upstream)
    assert not any("dropout" in name and "backward" in name for name in data)
    backward = [name for name in data if ".backward" in name and "Module" in name]
    assert backward == [
        "Module.2.Dropout.backward.0",
        "Module.1.Identity.backward.0",
        "Module.0.Linear.backward.0",
    ]


def test_a_result_that_is_an_argument_counts_as_both(tmp_path):
    """The gradient of a passed argument is that of the result, the sum of its uses."""
    model = torch.nn.Sequential()
    model.passes = Passes()
    x = torch.randn(3, requires_grad=True)
    y = torch.randn(3, requires_grad=True)

    def run(m):
        first, second = m.passes(x, y)
        (first.sum() + 2 * second.sum()).backward()

    _, found = record(tmp_path, model, run, level="L0")

    name = "Module.passes.Passes.backward.0"
    assert torch.equal(found[f"{name}.input.1"], torch.full((3,), 2.0))
    assert torch.equal(found[f"{name}.output.0"], x.grad)
    assert torch.equal(found[f"{name}.output.1"], y.grad)


def test_what_a_backward_computes_again_is_recorded(tmp_path):
    """Checkpointed modules and functions have a second forward, in the backward."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    x = torch.randn(2, 4, requires_grad=True)

    def run(m):
        checkpoint(m[1], m[0](x), use_reentrant=False).sum().backward()

    data, _ = record(tmp_path, model, run)

    assert "Functional.gelu.1.forward" in data
    assert "Module.1.GELU.forward.1" in data
    backward = [name for name in data if "GELU.backward" in name]
    assert backward == ["Module.1.GELU.backward.0"]
    assert torch.autograd._engine_run_backward is ENGINE


ENGINE = torch.autograd._engine_run_backward


def test_calls_of_optimizers_and_clipping_have_parents(tmp_path):
    """They stand below `optimizer` and `clip_grad`, and see gradients as they were."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def run(m):
        m(torch.full((2, 4), 50.0)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        torch.exp(torch.ones(1))

    data, found = record(tmp_path, model, run)

    (rank,) = (tmp_path / "dump" / "step0").iterdir()
    parents = json.loads((rank / "construct.json").read_text())
    assert parents["Torch._foreach_norm.0.forward"] == "clip_grad"
    assert parents["Tensor.__iadd__.0.forward"] == "optimizer"
    assert parents["Torch.exp.0.forward"] is None
    assert parents["optimizer"] is parents["clip_grad"] is None
    before = found["Module.0.Linear.parameters_grad.0.weight"]
    assert torch.equal(found["Torch._foreach_norm.0.forward.input.0.0"], before)
    assert model[0].weight.grad.norm() < 1.1 < before.norm()
    assert not _global_optimizer_pre_hooks
    assert "Module.0.Linear.backward.0" in data
