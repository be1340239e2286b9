# SPDX-License-Identifier: Apache-2.0
"""`PrecisionDebugger` as msProbe's users call it."""

import json
import subprocess
import sys

import pytest
import tools
import torch
from toy import Compiled, InPlace, Model

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.errors import CaptureError, ConfigError


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def read(folder, step=0):
    """The data of the one rank of a step."""
    (rank,) = (folder / f"step{step}").iterdir()
    return json.loads((rank / "dump.json").read_text())["data"]


def record(folder, model, steps=1, **options):
    """Runs a model under a debugger and returns the data of its last step."""
    debugger = PrecisionDebugger(dump_path=str(folder), **options)
    with torch.inference_mode():
        for _ in range(steps):
            debugger.start(model=model)
            model(torch.arange(5))
            debugger.stop()
            debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    return read(folder, steps - 1)


def test_modules_are_recorded_in_order_of_their_ends(tmp_path):
    """At L0 every submodule has a record, children before their parents."""
    names = list(record(tmp_path, Model(), level="L0"))

    assert names == [
        "Module.embed.Embedding.forward.0",
        "Module.blocks.0.proj.Linear.forward.0",
        "Module.blocks.0.scale.Scale.forward.0",
        "Module.blocks.0.shared.LayerNorm.forward.0",
        "Module.blocks.0.Block.forward.0",
        "Module.blocks.1.proj.Linear.forward.0",
        "Module.blocks.1.scale.Scale.forward.0",
        "Module.blocks.0.shared.LayerNorm.forward.1",
        "Module.blocks.1.Block.forward.0",
        "Module.compiled.Compiled.forward.0",
    ]


def test_module_records_have_all_sides(tmp_path):
    """A module's record holds arguments, keywords, outputs and direct parameters."""
    data = record(tmp_path, Model(), level="L0")

    block = data["Module.blocks.0.Block.forward.0"]
    assert list(block) == ["input_args", "input_kwargs", "output", "parameters"]
    assert list(block["input_kwargs"]) == ["residual"]
    assert block["output"][1] is None
    assert block["parameters"] == {}
    linear = data["Module.blocks.0.proj.Linear.forward.0"]
    assert list(linear["parameters"]) == ["weight", "bias"]


def test_numbers_are_those_of_the_tensors(tmp_path):
    """The statistics are those of the values that went in and out."""
    model = Model()
    data = record(tmp_path, model, level="L0")
    x = model.embed(torch.arange(5)).detach().double()

    found = data["Module.embed.Embedding.forward.0"]["output"][0]

    assert found["Max"] == pytest.approx(x.max().item())
    assert found["Mean"] == pytest.approx(x.mean().item(), rel=1e-6)
    assert found["Norm"] == pytest.approx(x.norm().item(), rel=1e-6)


def test_classes_that_bypass_call_are_seen(tmp_path):
    """A class whose __call__ goes straight to forward is recorded."""
    assert "Module.compiled.Compiled.forward.0" in record(tmp_path, Model(), level="L0")
    assert type(Model().compiled) is Compiled


def test_apis_are_recorded_under_msprobes_names(tmp_path):
    """At L1 functions, methods and operators have msProbe's names."""
    names = list(record(tmp_path, Model(), level="L1"))

    assert "Functional.embedding.0.forward" in names
    assert "Functional.linear.1.forward" in names
    assert "Functional.layer_norm.0.forward" in names
    assert "Tensor.__mul__.0.forward" in names
    assert "Tensor.__add__.2.forward" in names
    assert not any(name.startswith("Module.") for name in names)


def test_mix_records_both_with_parents(tmp_path):
    """At mix an API's parent is the module around it."""
    record(tmp_path, Model(), level="mix")
    (rank,) = (tmp_path / "step0").iterdir()
    parents = json.loads((rank / "construct.json").read_text())

    assert (
        parents["Functional.linear.0.forward"]
        == "Module.blocks.0.proj.Linear.forward.0"
    )
    assert parents["Module.blocks.0.Block.forward.0"] is None


def test_inputs_are_read_before_and_outputs_after(tmp_path):
    """A module that writes its argument has the old values in and the new ones out."""
    model = torch.nn.Sequential(InPlace())
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="mix")
    debugger.start(model=model)
    model(torch.zeros(3))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    for record_ in read(tmp_path).values():
        assert record_["input_args"][0]["Max"] == 0.0
        assert record_["output"][0]["Max"] == 1.0


def test_everything_is_taken_off_again(tmp_path):
    """After a capture no module and no function of torch is changed."""
    model = Model()
    functions = {
        name: getattr(torch.nn.functional, name) for name in ("sigmoid", "tanh")
    }

    record(tmp_path, model, level="mix")

    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(getattr(torch.nn.functional, n) is f for n, f in functions.items())


def test_steps_have_folders_and_counters_of_their_own(tmp_path):
    """Numbers of calls start again in every step."""
    record(tmp_path, Model(), steps=3, level="L1")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["step0", "step1", "step2"]
    assert list(read(tmp_path, 0)) == list(read(tmp_path, 2))


def test_only_selected_steps_are_recorded(tmp_path):
    """Steps outside `step` leave nothing."""
    record(tmp_path, Model(), steps=3, level="L0", step=["1", 2])

    assert sorted(p.name for p in tmp_path.iterdir()) == ["step1", "step2"]


def test_two_pairs_fill_one_step(tmp_path):
    """A second start in a step goes on with numbers and records."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    for _ in range(2):
        debugger.start(model=model)
        model(torch.arange(5))
        debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert "Module.compiled.Compiled.forward.1" in read(tmp_path)


def test_calls_outside_start_and_stop_do_not_count(tmp_path):
    """What runs while recording is off leaves no record and takes no number."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="mix")
    debugger.start(model=model)
    debugger.stop()
    model(torch.arange(5))
    debugger.start(model=model)
    model(torch.arange(5))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert "Module.compiled.Compiled.forward.0" in read(tmp_path)
    assert "Module.compiled.Compiled.forward.1" not in read(tmp_path)


def test_recording_that_was_not_stopped_goes_on(tmp_path):
    """step() without stop() loses nothing: the next step is recorded too."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    debugger.start(model=model)
    model(torch.arange(5))
    debugger.step()
    model(torch.arange(5))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert list(read(tmp_path, 0)) == list(read(tmp_path, 1))


def test_start_twice_is_harmless(tmp_path):
    """A second start while recording changes nothing."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    debugger.start(model=model)
    debugger.start(model=model)
    model(torch.arange(5))
    debugger.stop()
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert len(read(tmp_path)) == 10


def test_stop_and_step_without_start_are_harmless(tmp_path):
    """Stop and step before any start write nothing and raise nothing."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")

    debugger.stop()
    debugger.step()

    assert list(tmp_path.iterdir()) == []


def test_there_is_one_object_a_process(tmp_path):
    """A later construction returns the first object and ignores its arguments."""
    first = PrecisionDebugger(dump_path=str(tmp_path), level="L0")

    second = PrecisionDebugger(dump_path=5, level="nonsense")

    assert second is first
    assert second.config.level == "L0"


def test_methods_need_an_object():
    """Calling a method before construction is an error that says what to do."""
    for method in (
        PrecisionDebugger.start,
        PrecisionDebugger.stop,
        PrecisionDebugger.step,
    ):
        with pytest.raises(CaptureError, match="was not constructed"):
            method()


@pytest.mark.parametrize(
    "options",
    [
        {"level": "L9"},
        {"task": 3},
        {"dump_path": 3},
        {"step": "all"},
        {"config_path": 3},
        {"config_path": "missing.json"},
    ],
)
def test_bad_arguments_leave_no_object(options):
    """A wrong argument is refused, and a right construction can follow."""
    with pytest.raises(ConfigError):
        PrecisionDebugger(**options)

    assert PrecisionDebugger(level="L1").config.level == "L1"


def test_config_file_is_read(tmp_path):
    """A config.json gives level and path."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"level": "L0", "dump_path": str(tmp_path / "d")}))

    assert PrecisionDebugger(config_path=str(path)).config.level == "L0"


def test_config_file_needs_a_dump_path(tmp_path):
    """Without dump_path the file is refused, as msProbe does."""
    path = tmp_path / "config.json"
    path.write_text("{}")

    with pytest.raises(ConfigError, match="dump_path"):
        PrecisionDebugger(config_path=str(path))


def test_levels_with_modules_need_a_model(tmp_path):
    """start() without a model is refused at L0."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")

    with pytest.raises(CaptureError, match="no model was given"):
        debugger.start()


def test_ranks_outside_the_selection_record_nothing(tmp_path, caplog):
    """A rank that is not selected leaves nothing and says so once."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L1")
    object.__setattr__(debugger.config, "rank", (3,))

    debugger.start(rank_id=0)
    torch.ones(1) + 1
    debugger.stop()
    debugger.step()

    assert list(tmp_path.iterdir()) == []
    assert "rank 0 is not among [3]" in caplog.text


def test_rank_names_the_folder(tmp_path):
    """A rank given to start names the folder."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L1")
    debugger.start(rank_id=2)
    torch.ones(1) + 1
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert [p.name for p in (tmp_path / "step0").iterdir()] == ["rank2"]


@pytest.mark.parametrize("value", [-1, True, "0"])
def test_bad_ranks_and_steps_are_refused(tmp_path, value):
    """rank_id and set_init_step take whole numbers from 0."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L1")

    with pytest.raises(ConfigError, match="whole number"):
        debugger.start(rank_id=value)
    with pytest.raises(ConfigError, match="whole number"):
        debugger.set_init_step(value)


def test_init_step_numbers_the_folders(tmp_path):
    """set_init_step gives the current step its number."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L1")
    debugger.set_init_step(7)
    debugger.start()
    torch.ones(1) + 1
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert [p.name for p in tmp_path.iterdir()] == ["step7"]


@pytest.mark.parametrize("bounds", [3, [1], [2, 1], [-1, 2], [True, 2], ["0", "1"]])
def test_bad_token_ranges_are_refused(tmp_path, bounds):
    """token_range takes two whole numbers, the first not above the second."""
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L1")

    with pytest.raises(ConfigError, match="token_range"):
        debugger.start(model=Model(), token_range=bounds)
    with pytest.raises(CaptureError, match="model"):
        debugger.start(token_range=[0, 1])


def test_token_range_records_the_chosen_forwards(tmp_path):
    """Only the forwards of the range are recorded, counted from each start."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    for _ in range(2):
        debugger.start(model=model, token_range=[1, 2])
        for count in range(1, 6):
            model(torch.arange(count))
        debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    found = [
        record["input_args"][0]["shape"]
        for name, record in read(tmp_path).items()
        if ".embed." in name
    ]
    assert found == [[2], [3], [2], [3]]


def test_an_exception_of_the_model_is_not_hidden(tmp_path):
    """What the model raises comes through, and later calls are recorded."""

    class Fails(torch.nn.Module):
        def forward(self, x):
            if x.sum() == 0:
                raise KeyError("model")
            return x

    model = torch.nn.Sequential(Fails())
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="mix")
    debugger.start(model=model)
    with pytest.raises(KeyError, match="model"):
        model(torch.zeros(2))
    model(torch.ones(2))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert debugger.error is None
    assert "Module.0.Fails.forward.1" in read(tmp_path)


def test_an_error_of_ours_never_reaches_the_model(tmp_path, monkeypatch, caplog):
    """If recording fails, the model goes on, and the error is kept and logged."""
    model = Model()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    debugger.start(model=model)

    def fail(*_args, **_kwargs):
        raise ArithmeticError("planted")

    monkeypatch.setattr("pytest_msprobe.debugger.measure.Measurer.measure", fail)
    result = model(torch.arange(5))
    debugger.stop()
    debugger.step()

    assert result.shape == (5, 8)
    assert isinstance(debugger.error, ArithmeticError)
    assert "planted" in caplog.text


def test_an_open_step_is_written_at_exit(tmp_path):
    """A program that ends without stop and step leaves what it recorded."""
    program = (
        "import torch\nfrom pytest_msprobe import PrecisionDebugger\n"
        f"d = PrecisionDebugger(dump_path={str(tmp_path)!r}, level='L1')\n"
        "d.start()\ntorch.ones(2) + 1\n"
    )

    subprocess.run(
        [sys.executable, "-c", program], check=True, env=tools.clean_environment()
    )

    assert list(read(tmp_path)) == ["Tensor.__add__.0.forward"]


def test_several_models_have_their_number_in_the_name(tmp_path):
    """Modules of a list of models are named by the model's place."""
    models = [
        torch.nn.Sequential(torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.GELU()),
    ]
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    debugger.start(model=models)
    for model in models:
        model(torch.ones(2))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert list(read(tmp_path)) == [
        "Module.0.0.ReLU.forward.0",
        "Module.1.0.GELU.forward.0",
    ]


def test_tensors_are_saved(tmp_path):
    """The task tensor saves what was measured, under msProbe's names."""
    data = record(tmp_path, Model(), level="L0", task="tensor")
    (rank,) = (tmp_path / "step0").iterdir()

    entry = data["Module.embed.Embedding.forward.0"]["output"][0]
    saved = torch.load(
        rank / "dump_tensor_data" / entry["data_name"], weights_only=True
    )

    assert entry["data_name"] == "Module.embed.Embedding.forward.0.output.0.pt"
    assert saved.max().item() == entry["Max"]
    assert tuple(saved.shape) == (5, 8)


@pytest.mark.parametrize("task", ["structure"])
def test_structure_measures_nothing(tmp_path, task):
    """The task structure leaves data empty and the tree filled."""
    record(tmp_path, Model(), level="mix", task=task)
    (rank,) = (tmp_path / "step0").iterdir()

    assert json.loads((rank / "dump.json").read_text())["data"] == {}
    assert len(json.loads((rank / "construct.json").read_text())) > 10
