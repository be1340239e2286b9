# SPDX-License-Identifier: Apache-2.0
"""The rest of msProbe's API: save, own functions, single modules, orders of calls."""

import atexit
import contextlib
import copy
import inspect
import io
import json
import os
import threading
import types
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from toy import InPlace, Model

import pytest_msprobe
from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.dump.layout import steps_of
from pytest_msprobe.errors import CaptureError, ConfigError


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def made(folder, **config):
    """A debugger that dumps into a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({"dump_path": str(folder / "dump"), **config}))
    return PrecisionDebugger(config_path=str(path))


def in_a_thread(function):
    """Calls a function in a thread of its own."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def read(folder, step=0, name="dump.json"):
    """The data of the one rank of a step."""
    (rank,) = (folder / "dump" / f"step{step}").iterdir()
    return json.loads((rank / name).read_text())["data"]


def names(folder, step=0):
    """Names of the records of a step."""
    return list(read(folder, step))


# save --------------------------------------------------------------------------


def test_saved_variables_and_their_gradients(tmp_path):
    """Every variable has an entry a call, and its gradient once backward ran."""
    debugger = made(tmp_path, level="debug", task="tensor")
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    y = w * 3
    debugger.save({"a": [y, None], "b": (1, "x")}, "v")
    debugger.save(y, "v", save_backward=False)
    y.square().sum().backward()
    debugger.step()

    data = read(tmp_path, name="debug.json")
    assert list(data) == ["v.0.debug", "v_grad.0.debug", "v.1.debug"]
    assert data["v_grad.0.debug"]["b"] == [None, None]
    assert data["v.1.debug"]["Max"] == 6.0
    assert data["v_grad.0.debug"]["a"][0]["Max"] == 12.0
    (rank,) = (tmp_path / "dump" / "step0").iterdir()
    file = rank / "dump_tensor_data" / data["v_grad.0.debug"]["a"][0]["data_name"]
    assert file.name == "v_grad.0.debug.a.0.pt"
    assert torch.equal(torch.load(file), 2 * y.detach())


def test_a_gradient_that_never_comes_stays_null(tmp_path):
    """Without a backward the gradient's entry is null."""
    debugger = made(tmp_path, level="debug")
    debugger.save(torch.ones(2, requires_grad=True), "v")
    debugger.step()

    assert read(tmp_path, name="debug.json")["v_grad.0.debug"] is None


def test_saved_names_are_numbered_within_a_step(tmp_path):
    """Numbers begin again in every step, and steps outside `step` save nothing."""
    debugger = made(tmp_path, level="debug", step=[0, 2])
    for _ in range(3):
        debugger.save(1, "v")
        debugger.step()

    assert list(steps_of(tmp_path / "dump")) == [0, 2]
    assert list(read(tmp_path, 2, "debug.json")) == ["v.0.debug", "v_grad.0.debug"]


@pytest.mark.parametrize(
    ("variable", "name"),
    [(object(), "v"), ([{1, 2}], "v"), ({1: 2}, "v"), (1j, "v"), (1, 3)],
)
def test_what_cannot_be_saved_is_said(tmp_path, caplog, variable, name):
    """A variable or name of another kind is reported and breaks nothing."""
    debugger = made(tmp_path, level="debug")

    debugger.save(variable, name)
    debugger.step()

    assert "cannot be saved" in caplog.text
    assert not (tmp_path / "dump").exists()


def test_save_needs_level_debug(tmp_path, caplog):
    """At another level save says that it does nothing."""
    made(tmp_path, level="L1").save(1, "v")

    assert "nothing is saved at L1" in caplog.text


# Custom functions --------------------------------------------------------------


def own_module():
    """A module with a function of the user's own."""
    module = types.ModuleType("mine")
    module.twice = lambda x, *, bias=0: x * 2 + bias
    return module


def test_a_registered_function_is_recorded(tmp_path):
    """Its calls have rows under module or prefix, and nothing inside has."""
    debugger = made(tmp_path, level="L1")
    module, other = own_module(), own_module()
    debugger.register_custom_api(module, "twice")
    debugger.register_custom_api(other, "twice", "Custom")
    debugger.start()
    assert module.twice(torch.ones(2), bias=1).tolist() == [3, 3]
    other.twice(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["mine.twice.0.forward", "Custom.twice.0.forward"]
    assert read(tmp_path)["mine.twice.0.forward"]["output"][0]["Max"] == 3.0


def test_a_restored_function_is_the_original(tmp_path):
    """Restoring puts the very object back, registering twice wraps once."""
    debugger = made(tmp_path, level="L1")
    module = own_module()
    original = module.twice
    debugger.register_custom_api(module, "twice")
    debugger.register_custom_api(module, "twice")
    debugger.start()
    module.twice(torch.ones(2))
    debugger.restore_custom_api(module, "twice")
    debugger.restore_custom_api(module, "twice")
    debugger.stop()
    debugger.step()

    assert module.twice is original
    assert names(tmp_path) == ["mine.twice.0.forward"]


def test_functions_of_one_name_are_numbered_together(tmp_path):
    """No call takes the name of another one, whoever registered the function."""
    debugger = made(tmp_path, level="L1")
    module, other = own_module(), own_module()
    debugger.register_custom_api(module, "twice", "Torch")
    debugger.register_custom_api(other, "twice", "Torch")
    debugger.start()
    module.twice(torch.ones(2))
    other.twice(torch.ones(2))
    debugger.restore_custom_api(module, "twice")
    debugger.register_custom_api(module, "twice", "Torch")
    module.twice(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == [f"Torch.twice.{number}.forward" for number in range(3)]


def test_a_registered_function_may_have_the_name_of_an_api(tmp_path):
    """Its calls are numbered together with those of the API."""
    debugger = made(tmp_path, level="L1")
    module = own_module()
    module.exp = lambda x: x + 1
    debugger.register_custom_api(module, "exp", "Torch")
    debugger.start()
    torch.exp(torch.ones(1))
    module.exp(torch.ones(1))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["Torch.exp.0.forward", "Torch.exp.1.forward"]


def test_reset_restores_registered_functions(tmp_path):
    """Forgetting the object leaves nothing of ours behind."""
    debugger = made(tmp_path, level="L1")
    module = own_module()
    original = module.twice
    debugger.register_custom_api(module, "twice")

    PrecisionDebugger.reset()

    assert module.twice is original


@pytest.mark.parametrize(
    ("api", "prefix"), [("missing", None), (3, None), ("twice", 3), ("__name__", None)]
)
def test_bad_registrations_are_refused(tmp_path, api, prefix):
    """A function that is not there and a prefix that is no text are errors."""
    with pytest.raises(ConfigError):
        made(tmp_path, level="L1").register_custom_api(own_module(), api, prefix)


# One module --------------------------------------------------------------------


def test_one_module_is_recorded_between_its_calls(tmp_path):
    """module_dump records this module alone; functions are back behind it."""
    model = Model()
    debugger = made(tmp_path, level="L1")
    debugger.start()
    torch.exp(torch.ones(1))
    for _ in range(2):
        pytest_msprobe.module_dump(model.blocks[0], "chosen")
        model(torch.arange(3))
        pytest_msprobe.module_dump_end()
    torch.exp(torch.ones(1))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == [
        "Torch.exp.0.forward",
        "Module.chosen.Block.forward.0",
        "Module.chosen.Block.forward.1",
        "Torch.exp.1.forward",
    ]
    assert "forward" not in model.blocks[0].__dict__


def test_a_single_module_that_writes_its_input(tmp_path):
    """Its input is read before and its output after, though no mode sees the write."""
    module, x = InPlace(), torch.zeros(2)
    debugger = made(tmp_path, level="L1")
    debugger.start()
    for _ in range(2):
        pytest_msprobe.module_dump(module, "chosen")
        module(x)
        pytest_msprobe.module_dump_end()
    debugger.stop()
    debugger.step()

    found = [
        (call["input_args"][0]["Max"], call["output"][0]["Max"])
        for call in read(tmp_path).values()
    ]
    assert found == [(0.0, 1.0), (1.0, 2.0)]


def test_module_dump_needs_a_start(tmp_path):
    """Without recording, and without a module, module_dump is an error."""
    made(tmp_path, level="L1")

    with pytest.raises(CaptureError, match="nothing is being recorded"):
        pytest_msprobe.module_dump(Model(), "chosen")
    with pytest.raises(ConfigError, match="expected a module"):
        pytest_msprobe.module_dump("model", "chosen")
    pytest_msprobe.module_dump_end()


def test_a_module_that_is_recorded_anyway_is_said(tmp_path, caplog):
    """module_dump of a module that start has hooked changes nothing and says so."""
    model = Model()
    debugger = made(tmp_path, level="L0")
    debugger.start(model=model)
    pytest_msprobe.module_dump(model.embed, "chosen")
    model(torch.arange(3))
    pytest_msprobe.module_dump_end()
    debugger.stop()
    debugger.step()

    assert "start has hooked this module" in caplog.text
    assert len(names(tmp_path)) == 10


# Models and orders of calls ----------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_models(tmp_path, kind):
    """Models in a list or tuple are recorded below their place in it."""
    models = kind((Model(), Model()))
    debugger = made(tmp_path, level="L0")
    debugger.start(model=models)
    for model in models:
        model(torch.arange(3))
    debugger.stop()
    debugger.step()

    assert "Module.1.blocks.0.proj.Linear.forward.0" in names(tmp_path)
    assert len(names(tmp_path)) == 20


def test_a_model_that_a_second_start_brings_is_recorded(tmp_path):
    """A start while recording adds its model; nothing is lost silently."""
    first, second = Model(), torch.nn.Sequential(torch.nn.Tanh())
    debugger = made(tmp_path, level="L0")
    debugger.start(model=first)
    debugger.start(model=second)
    second(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["Module.0.Tanh.forward.0"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_new_list_of_the_same_models_changes_nothing(tmp_path, kind):
    """Models given in another list, or alone, at the next step have one record each."""
    first, second = Model(), Model()
    debugger = made(tmp_path, level="L0")
    for model in (kind([first, second]), kind([first, second]), first, [second]):
        debugger.start(model=model)
        first(torch.arange(3))
        second(torch.arange(3))
        debugger.stop()
        debugger.step()

    assert len(names(tmp_path, 0)) == 20
    for step in (1, 2, 3):
        assert names(tmp_path, step) == names(tmp_path, 0)


def test_a_model_that_joins_a_list_is_recorded(tmp_path):
    """A list that has grown since the last start is looked at anew."""
    first, second = Model(), torch.nn.Sequential(torch.nn.Tanh())
    models = [first]
    debugger = made(tmp_path, level="L0")
    debugger.start(model=models)
    models.append(second)
    debugger.start(model=models)
    second(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["Module.1.0.Tanh.forward.0"]


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_layers_that_join_a_model_are_recorded(tmp_path, level):
    """A layer that replaced another one, or was added, is met by the next start."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    debugger = made(tmp_path, level=level)
    for _ in range(2):
        debugger.start(model=model, token_range=[0, 0])
        model(torch.ones(1, 2))
        debugger.stop()
        debugger.step()
        model[0] = torch.nn.Linear(2, 2)
        model.append(torch.nn.Tanh())

    assert [name for name in names(tmp_path, 1) if "Module" in name] == [
        "Module.0.Linear.forward.0",
        "Module.1.ReLU.forward.0",
        "Module.2.Tanh.forward.0",
    ]


def test_a_part_of_a_model_given_before_is_recorded_once(tmp_path):
    """Modules keep the name that the first start gave them; others join them."""
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Tanh()), torch.nn.ReLU())
    debugger = made(tmp_path, level="L0")
    debugger.start(model=model[0])
    debugger.start(model=model, token_range=[0, 0])
    model(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == [
        "Module.0.Tanh.forward.0",
        "Module.0.Sequential.forward.0",
        "Module.1.ReLU.forward.0",
    ]


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize(
    "model",
    [3, "model", {}, [None], (Model(), 3), Model, torch.ones(2)],
    ids=["int", "str", "dict", "none", "pair", "class", "tensor"],
)
def test_what_is_no_model_is_refused(tmp_path, level, model):
    """A model is a module, or a list or tuple of modules; the message says so."""
    debugger = made(tmp_path, level=level)

    with pytest.raises(ConfigError, match="expected a module, or a list or tuple"):
        debugger.start(model=model)


def test_an_empty_list_is_no_model(tmp_path):
    """A level with modules needs at least one."""
    with pytest.raises(CaptureError, match="no model was given"):
        made(tmp_path, level="L0").start(model=[])


def scripted():
    """A module in TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.jit.script(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_parts_in_torchscript_are_left_out(tmp_path, level):
    """A scripted module inside a model has no record, the others have."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), scripted(), torch.nn.Tanh())
    debugger = made(tmp_path, level=level)
    debugger.start(model=model)
    model(torch.ones(1, 2))
    debugger.stop()
    debugger.step()

    assert debugger.error is None
    modules = [name for name in names(tmp_path) if name.startswith("Module")]
    assert modules == ["Module.0.Linear.forward.0", "Module.2.Tanh.forward.0"]


def test_a_model_in_torchscript_is_refused(tmp_path):
    """Nothing could be recorded of it."""
    with pytest.raises(ConfigError, match="TorchScript"):
        made(tmp_path, level="L0").start(model=scripted())


def test_no_request_of_that_name(tmp_path, caplog):
    """A batch without the configured request records nothing and says so."""
    debugger = made(tmp_path, level="L1", statistics={"request_id": "a"})
    debugger.start(scheduled_tokens={"b": 2})
    torch.exp(torch.ones(2))
    debugger.stop()
    debugger.step()

    assert not steps_of(tmp_path / "dump")
    assert "request 'a' is not in this step" in caplog.text


@pytest.mark.parametrize("scheduled", [[1], {"a": 0}, {1: 2}, {"a": True}, {"a": "1"}])
def test_bad_scheduled_tokens_are_refused(tmp_path, scheduled):
    """scheduled_tokens maps ids to numbers from 1."""
    debugger = made(tmp_path, level="L1")

    with pytest.raises(ConfigError, match="scheduled_tokens"):
        debugger.start(scheduled_tokens=scheduled)


@pytest.mark.parametrize("call", ["step", "stop"])
def test_a_module_that_is_running_at_the_end_of_a_step(tmp_path, call):
    """It has its inputs in the step in which it began, and nothing in another one."""
    debugger = made(tmp_path, level="L0")

    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.child = torch.nn.Tanh()

        def forward(self, x):
            x = self.child(x)
            getattr(debugger, call)()
            return self.child(x)

    model = torch.nn.Sequential(Calls())
    debugger.start(model=model)
    model(torch.ones(1))
    if call == "stop":
        debugger.step()
        debugger.start(model=model)
    model[0].child(torch.ones(1))
    debugger.stop()
    debugger.step()

    child, outer = "Module.0.child.Tanh.forward", "Module.0.Calls.forward.0"
    assert names(tmp_path) == [f"{child}.0", outer]
    assert list(read(tmp_path)[outer]) == ["input_args", "input_kwargs"]
    count = 2 if call == "step" else 1
    assert names(tmp_path, 1) == [f"{child}.{number}" for number in range(count)]


def test_set_init_step_begins_another_step(tmp_path):
    """What was recorded before has the old number, what comes behind the new one."""
    debugger = made(tmp_path, level="L1")
    debugger.start()
    torch.exp(torch.ones(1))
    debugger.set_init_step(7)
    torch.sin(torch.ones(1))
    debugger.step()
    torch.cos(torch.ones(1))
    debugger.stop()
    debugger.step()

    for step, name in ((0, "exp"), (7, "sin"), (8, "cos")):
        assert names(tmp_path, step) == [f"Torch.{name}.0.forward"]


ORDERS = [
    ("start stop init:5 start stop step", 2),
    ("start init:5 stop step start stop step", 2),
    ("start init:0 stop step", 1),
    ("start init:5 step stop", 1),
    ("init:5 start", 1),
    ("start stop step", 1),
    ("start step stop", 1),
    ("start start stop stop step", 1),
    ("stop step start stop step", 1),
    ("step step start stop step", 1),
    ("start stop start stop step", 2),
    ("start stop", 1),
    ("start", 1),
]


@pytest.mark.parametrize(("order", "rows"), ORDERS)
def test_any_order_of_calls_loses_nothing(tmp_path, order, rows):
    """Whatever the order, what ran behind a start is in the dump."""
    debugger = made(tmp_path, level="L1")
    for word in order.split():
        call, _, number = word.partition(":")
        if number:
            debugger.set_init_step(int(number))
            continue
        getattr(debugger, call)()
        if call == "start" and not order.startswith("start start"):
            torch.exp(torch.ones(1))
    if order.startswith("start start"):
        debugger.start()
        torch.exp(torch.ones(1))
        debugger.stop()
    PrecisionDebugger.reset()

    found = [
        name
        for path in (tmp_path / "dump").rglob("dump.json")
        for name in json.loads(path.read_text())["data"]
    ]
    assert len(found) == rows


def test_one_start_lasts_over_the_steps_that_are_left_out(tmp_path):
    """Recording that was never stopped goes on at every step that is wanted."""
    debugger = made(tmp_path, level="L1", step=[1, 3])
    debugger.start()
    for _ in range(5):
        torch.exp(torch.ones(1))
        debugger.step()

    assert list(steps_of(tmp_path / "dump")) == [1, 3]
    assert names(tmp_path, 3) == ["Torch.exp.0.forward"]


def test_a_stop_at_a_step_that_is_left_out_counts(tmp_path):
    """After stop nothing is recorded until the next start, whatever the step."""
    debugger = made(tmp_path, level="L1", step=[1])
    debugger.start()
    debugger.stop()
    debugger.step()
    torch.exp(torch.ones(1))
    debugger.step()

    assert not steps_of(tmp_path / "dump")


class Passing(TorchFunctionMode):
    """A mode of the user's own, which counts what it sees."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        self.count += func is torch.exp
        return func(*args, **(kwargs or {}))


def test_modes_of_the_user_may_begin_and_end_anywhere(tmp_path):
    """Start and stop need not nest with function modes; each stays on as meant."""
    debugger = made(tmp_path, level="L1")
    x, mode = torch.ones(1), Passing()
    with mode:
        debugger.start()
        torch.exp(x)
    torch.exp(x)
    with mode:
        torch.exp(x)
        assert (1 + x).item() == 2
        debugger.stop()
        torch.exp(x)
    torch.exp(x)
    debugger.step()

    assert names(tmp_path) == [
        *(f"Torch.exp.{number}.forward" for number in range(3)),
        "Tensor.__radd__.0.forward",
    ]
    assert mode.count == 3
    assert not torch.overrides._get_current_function_mode_stack()


def test_stop_may_be_called_in_another_thread(tmp_path):
    """It stops the recording; a later start records every call once."""
    debugger = made(tmp_path, level="L1")
    x = torch.ones(1)
    for _ in range(2):
        debugger.start()
        torch.exp(x)
        in_a_thread(debugger.stop)
        torch.sin(x)
    debugger.step()

    assert names(tmp_path) == ["Torch.exp.0.forward", "Torch.exp.1.forward"]


@contextlib.contextmanager
def default_device():
    """The device meta for what is made inside, by another means."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("place", [lambda: torch.device("meta"), default_device])
def test_a_default_device_may_begin_and_end_anywhere(tmp_path, place):
    """Torch's own modes for devices are on as long as they were."""
    debugger = made(tmp_path, level="L1")
    with place():
        debugger.start()
        assert torch.exp(torch.ones(1)).is_meta
    assert not torch.exp(torch.ones(1)).is_meta
    with place():
        assert torch.exp(torch.ones(1)).is_meta
        debugger.stop()
        assert torch.exp(torch.ones(1)).is_meta
    debugger.step()

    assert len(names(tmp_path)) == 3
    assert not torch.overrides._get_current_function_mode_stack()


# dump_enable -------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """The file is looked at whenever it may be."""
    monkeypatch.setattr("pytest_msprobe.config.watch.ON_INTERVAL", 0.0)
    monkeypatch.setattr("pytest_msprobe.config.watch.OFF_INTERVAL", 0.0)


def rewrite(folder, **config):
    """Changes the configuration of a debugger of `made`."""
    path = folder / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, **config}))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


@pytest.mark.usefixtures("at_once")
def test_recording_is_switched_between_steps(tmp_path):
    """Steps while it is off have no files; numbers go on."""
    debugger = made(tmp_path, level="mix", dump_enable=False)
    model = Model()
    for is_on in (False, True, False, True):
        rewrite(tmp_path, dump_enable=is_on)
        debugger.start(model=model)
        assert ("forward" in model.embed.__dict__) == is_on
        model(torch.arange(3))
        debugger.stop()
        debugger.step()

    assert list(steps_of(tmp_path / "dump")) == [1, 3]
    assert len(names(tmp_path, 1)) == len(names(tmp_path, 3)) > 10


@pytest.mark.usefixtures("at_once")
def test_recording_is_switched_within_a_step(tmp_path):
    """What was recorded before it was off is in the same step's files."""
    debugger = made(tmp_path, level="L1", dump_enable=True)
    for is_on, function in ((True, torch.exp), (False, torch.sin), (True, torch.cos)):
        rewrite(tmp_path, dump_enable=is_on)
        debugger.start()
        function(torch.ones(1))
        debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["Torch.exp.0.forward", "Torch.cos.0.forward"]


@pytest.mark.usefixtures("at_once")
def test_other_keys_hold_from_the_next_step(tmp_path):
    """A changed level or folder is taken over behind the open step, which is whole."""
    debugger = made(tmp_path, level="L1", dump_enable=True)
    model = Model()
    debugger.start(model=model)
    torch.exp(torch.ones(1))
    debugger.stop()
    rewrite(tmp_path, level="L0")
    debugger.start(model=model)
    torch.exp(torch.ones(1))
    debugger.stop()
    debugger.step()
    debugger.start(model=model)
    model(torch.arange(3))
    debugger.stop()
    debugger.step()

    assert names(tmp_path) == ["Torch.exp.0.forward", "Torch.exp.1.forward"]
    assert len(names(tmp_path, 1)) == 10
    assert all(name.startswith("Module.") for name in names(tmp_path, 1))


@pytest.mark.usefixtures("at_once")
def test_a_start_that_is_never_stopped_is_switched_too(tmp_path):
    """The file counts at each step, also where start was called once."""
    debugger = made(tmp_path, level="L0", dump_enable=True)
    model = Model()
    debugger.start(model=model)
    for is_on in (False, False, True, True):
        model(torch.arange(3))
        rewrite(tmp_path, dump_enable=is_on)
        debugger.step()

    assert list(steps_of(tmp_path / "dump")) == [0, 3]


# Copies of a model -------------------------------------------------------------


def patched():
    """A layer whose forward was replaced on the instance, as other tools do."""
    layer = torch.nn.Linear(2, 2)
    inner = layer.forward
    layer.forward = lambda x, *, bias=1: inner(x) + bias
    return layer


@pytest.mark.parametrize("data_mode", ["all", "forward"])
@pytest.mark.parametrize("is_stopped", [True, False])
def test_copies_compute_with_their_own_weights(tmp_path, data_mode, is_stopped):
    """A copy of a recorded model is no part of it: it runs alone, without a record."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    section = {"data_mode": [data_mode]}
    debugger = made(tmp_path, level="mix", statistics=section)
    debugger.start(model=model)
    if is_stopped:
        debugger.stop()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            copied[0].weight.zero_()
            copied[0].bias.fill_(3.0)
        assert copied(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert copied(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
    assert not any(name.startswith("Module") for name in names(tmp_path))


def test_signatures_of_modules_stay(tmp_path):
    """Whoever asks for the parameters of a forward gets those of the module."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), patched())
    before = [inspect.signature(module.forward) for module in model.modules()]
    debugger = made(tmp_path, level="L0")
    debugger.start(model=model)

    after = [inspect.signature(module.forward) for module in model.modules()]
    assert after == before
    assert model(torch.ones(1, 2)).shape == (1, 2)
    debugger.stop()
    debugger.step()
    assert len(names(tmp_path)) == 2


# Forked processes --------------------------------------------------------------


def in_a_fork(function):
    """Calls a function in a forked process that ends as any other; returns its status.

    The child is a copy of this process: only what it writes into files comes back.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other threads may be about
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        function()
        atexit._run_exitfuncs()
        status = 0
    finally:
        os._exit(status)


def test_a_forked_process_leaves_the_files_alone(tmp_path):
    """What it calls is no part of the parent's dump, whatever methods it calls."""
    debugger = made(tmp_path, level="mix")
    model = Model()
    debugger.start(model=model, rank_id=0)
    model(torch.arange(3))

    def child():
        model(torch.arange(5))
        debugger.stop()
        debugger.start(model=model)
        model(torch.arange(5))
        debugger.step()
        assert not steps_of(tmp_path / "dump")

    assert in_a_fork(child) == 0
    assert not steps_of(tmp_path / "dump")
    debugger.stop()
    debugger.step()
    modules = [name for name in names(tmp_path) if name.startswith("Module.embed")]
    assert modules == ["Module.embed.Embedding.forward.0"]


def test_a_forked_process_may_have_an_object_of_its_own(tmp_path):
    """A debugger constructed in it records into another folder."""
    debugger = made(tmp_path, level="mix")
    model = Model()
    debugger.start(model=model, rank_id=0)
    own = tmp_path / "own"
    own.mkdir()

    def child():
        other = made(own, level="mix")
        assert other is not debugger
        other.start(model=model, rank_id=1)
        model(torch.arange(3))
        other.stop()
        other.step()

    assert in_a_fork(child) == 0
    model(torch.arange(3))
    debugger.stop()
    debugger.step()
    assert names(own) == names(tmp_path)
    assert len(names(own)) > 10


# Stacks ------------------------------------------------------------------------


def here(x):
    """Calls from one place."""
    return torch.exp(x)


def there(x):
    """Calls from another place."""
    return torch.exp(x)


def test_every_step_has_stacks_of_its_own(tmp_path):
    """A call of the same name from elsewhere has the stack of that place."""
    debugger = made(tmp_path, level="L1")
    for function in (here, there):
        debugger.start()
        function(torch.ones(1))
        debugger.stop()
        debugger.step()

    for step, name in ((0, "here"), (1, "there")):
        (rank,) = (tmp_path / "dump" / f"step{step}").iterdir()
        ((_, lines),) = json.loads((rank / "stack.json").read_text()).values()
        assert f"in {name}," in lines[0]
