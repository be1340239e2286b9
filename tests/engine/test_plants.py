# SPDX-License-Identifier: Apache-2.0
"""What planted faults do to a tensor, without an engine."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pytest_msprobe.engine import plants  # noqa: E402 - needs torch


class Child(torch.nn.Module):
    """Doubles."""

    def forward(self, x):
        return x * 2


class Parent(torch.nn.Module):
    """Calls its child by an attribute."""

    def __init__(self):
        super().__init__()
        self.child = Child()

    def forward(self, x):
        return self.child(x) + 1


class Root(torch.nn.Module):
    """Holds a parent."""

    def __init__(self):
        super().__init__()
        self.parent = Parent()

    def forward(self, x):
        return self.parent(x)


def planted(model, place, size):
    """A fault in a model."""
    plant = plants.Plant(model, place, size, lambda: True)
    plant.install()
    return plant


def test_survey_finds_leaves_parents_and_arguments():
    """Leaves can be scaled, parents' results too, and what a child is given."""
    model = Root()
    survey = plants.Survey(model)
    survey.install()
    model(torch.randn(9, 4))
    survey.remove()

    found = {(p.kind, p.module, p.child) for p in survey.places()}
    assert ("scale", "parent.child", "") in found
    assert ("result", "parent", "") not in found  # the root's child: no module above
    assert ("argument", "parent", "child") in found
    assert not any(vars(m).get("forward") for m in model.modules())


def test_own_code_stands_between_parent_and_child():
    """A child's changed argument is seen by what wraps the child, and is taken out."""
    model, x = Root(), torch.randn(9, 4)
    seen = []
    inner = model.parent.child.forward
    model.parent.child.forward = lambda y: seen.append(y) or inner(y)
    plant = planted(model, plants.Place("argument", "parent", "child"), 0.5)

    result = model(x)
    plant.remove()

    assert torch.equal(seen[0], x * 1.5)
    assert torch.equal(result, x * 3 + 1)
    assert torch.equal(model(x), x * 2 + 1)
    assert plant.moved == pytest.approx(0.5)
    assert plant.calls == 1


def test_an_error_in_a_plant_never_reaches_the_model():
    """What goes wrong while planting a change is kept, and the model goes on."""
    model, x = Root(), torch.randn(9, 4)
    plant = planted(model, plants.Place("heads", "parent.child"), 1.0)

    result = model(x)
    plant.remove()

    assert torch.equal(result, x * 2 + 1)
    assert plant.error.startswith("AttributeError")


@given(st.integers(-8, -1), st.integers(0, 2**31))
def test_rounding_leaves_few_significands(exponent, seed):
    """Rounding to steps moves an element by at most half a step, relatively."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator)

    y = plants._rounded(x, 2.0**exponent)

    assert ((y - x).abs() <= 2.0**exponent / 2 * x.abs() * 1.0001).all()


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_exchange_keeps_sums(share, seed):
    """Two rows that have a share of each other keep their sum; all of it swaps them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 7, generator=generator)

    y = plants._with_rows(x, share)

    assert torch.allclose(y.sum(0), x.sum(0), atol=1e-5)
    swapped = plants._with_rows(x, 1.0)
    assert torch.equal(swapped[3], x[6])
    assert torch.equal(swapped[6], x[3])


def test_change_is_measured_for_the_first_row_alone():
    """A huge first row does not hide a change of the others."""
    clean = torch.ones(5, 4)
    clean[0] = 1e6
    faulty = clean.clone()
    faulty[2] += 1

    assert plants.relative_change(clean, faulty) == pytest.approx(0.5)
    faulty[3, 3] = math.nan
    assert plants.relative_change(clean, faulty) == math.inf
    assert plants.relative_change(clean, clean.clone()) == 0.0


def test_weight_row_is_that_of_a_linear():
    """The planted row gives what the linear gives with that row larger."""
    linear = torch.nn.Linear(6, 9)
    root = torch.nn.Sequential(torch.nn.Sequential(linear))
    x = torch.randn(10, 6)
    plant = planted(root, plants.Place("weight_row", "0.0"), 0.25)

    found = root(x)
    plant.remove()

    with torch.no_grad():
        linear.weight[3] *= 1.25
    assert torch.allclose(found, root(x), atol=1e-5)
