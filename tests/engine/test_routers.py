# SPDX-License-Identifier: Apache-2.0
"""Which experts routers chose: the hooks, on routers of several kinds. No engine."""

import sys
import threading
import types

import pytest
import torch

from pytest_msprobe.engine.experts import NAME, add_choices, remove_choices

IDS = torch.tensor([[3, 1], [0, 2]], dtype=torch.int64)
CHOSEN = (torch.ones(2, 2), IDS)


class Collector:
    """Says whether something is recorded, and keeps what went wrong."""

    def __init__(self, *, is_recording=True):
        self.is_recording = is_recording
        self.thread = threading.get_ident()
        self.error = None

    def fail(self, error):
        self.error = error


def router(method, result=CHOSEN):
    """An object that chooses by a method."""
    return types.SimpleNamespace(**{method: lambda *_args, **_kwargs: result})


def replace(owner, name, hook):
    """Replaces a method for good."""
    setattr(owner, name, hook(getattr(owner, name)))


def layers(*routers):
    """A model with a layer a router."""
    model = torch.nn.Module()
    for number, item in enumerate(routers):
        layer = torch.nn.Module()
        layer.router = item
        model.add_module(str(number), layer)
    return model


def chosen(layer):
    """What the layer's module gives when it is called, noted."""
    noted = []
    layer.choice.register_forward_hook(lambda _m, _args, out: noted.append(out))
    return noted


@pytest.mark.parametrize("method", ["_compute_routing", "select_experts"])
def test_choices_are_told_in_order(method):
    """Whatever method chooses, its ids are given in ascending order; it is kept."""
    item = router(method)
    model = layers(item)
    found = add_choices(model, Collector(), replace)
    noted = chosen(found[0])

    weights, ids = getattr(item, method)("states", router_logits=None)

    assert torch.equal(noted[0], torch.tensor([[1, 3], [0, 2]], dtype=torch.int32))
    assert ids is IDS
    assert weights.shape == (2, 2)
    assert found[0].choice.ids is None
    remove_choices(found)
    assert not list(model.get_submodule("0").named_children())


@pytest.fixture
def kernels(monkeypatch):
    """A module of vLLM's with the function by which kernels choose."""
    module = types.ModuleType("vllm.kernels_of_a_test")
    module.select_experts = lambda *_args, **_kwargs: CHOSEN
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_kernels_that_choose_themselves_are_met(kernels):
    """Where a kernel does not ask the router, the layer that ran it tells."""
    model = layers(router("_compute_routing"), router("_compute_routing"))
    for layer in model.children():
        layer.forward = lambda: kernels.select_experts()
    found = add_choices(model, Collector(), replace)
    first, second = (chosen(layer) for layer in found)
    original = kernels.select_experts

    found[1]()

    assert first == []
    assert torch.equal(second[0], torch.tensor([[1, 3], [0, 2]], dtype=torch.int32))
    assert kernels.select_experts is original


def test_a_layer_that_fails_leaves_the_function_as_it_was(kernels):
    """The function is put back also when the layer raises."""

    def fail():
        raise ValueError

    model = layers(router("select_experts"))
    model.get_submodule("0").forward = fail
    (layer,) = add_choices(model, Collector(), replace)
    original = kernels.select_experts

    with pytest.raises(ValueError, match=r"^$"):
        layer()

    assert kernels.select_experts is original


def test_a_forward_that_others_put_on_a_layer_stays():
    """What a test puts on a layer while a capture runs is there behind it."""
    model = layers(router("select_experts"))
    found = add_choices(model, Collector(), replace)
    (layer,) = found

    layer.forward = lambda: "own"
    remove_choices(found)

    assert layer() == "own"
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_other_threads_are_let_pass(kernels):
    """A layer that another thread runs tells nothing, and replaces nothing for good."""
    model = layers(router("select_experts"))
    (layer,) = add_choices(model, Collector(), replace)
    layer.forward = lambda: seen.append(kernels.select_experts)
    noted, seen, original = chosen(layer), [], kernels.select_experts

    thread = threading.Thread(target=layer)
    thread.start()
    thread.join()

    assert noted == []
    assert seen == [original]


def test_a_shared_router_tells_once():
    """Of two modules that hold one router the first has the choice."""
    item = router("select_experts")
    model = layers(item, item, "no router", None)

    found = add_choices(model, Collector(), replace)

    assert [hasattr(layer, NAME) for layer in model.children()] == [
        True, False, False, False,
    ]  # fmt: skip
    assert len(found) == 1


def test_nothing_is_told_while_nothing_is_recorded():
    """Outside a recorded step the hook only calls on."""
    item = router("select_experts")
    found = add_choices(layers(item), Collector(is_recording=False), replace)
    noted = chosen(found[0])

    item.select_experts()

    assert noted == []


def test_an_error_stays_outside_the_model():
    """A result of another form is kept as an error; the router's own is returned."""
    item = router("select_experts", result=(torch.ones(2), None))
    collector = Collector()
    add_choices(layers(item), collector, replace)

    assert item.select_experts()[1] is None
    assert collector.error is not None
