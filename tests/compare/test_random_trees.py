# SPDX-License-Identifier: Apache-2.0
"""One fault somewhere in a random tree of modules is named where it is."""

import numpy as np
from captures import OTHER_KEY, capture, module
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.model.limits import Rule

WIDTH = 16
LEAVES = st.just([])
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8
).filter(bool)


def paths_of(tree, path="m"):
    """(path, children) of every module below a root, parents before children."""
    yield path, len(tree)
    for number, inner in enumerate(tree):
        yield from paths_of(inner, f"{path}.{number}")


class Run:
    """A forward through a tree, with a fault.

    Args:
        fault: (path, place): the output of a module, or what a parent hands to its
            child of that number, is multiplied by `factor`.
        factor: By how much.
        noise: Relative noise that every leaf adds.
    """

    def __init__(self, tree, *, fault=(None, None), factor=1.2, noise=0.0, **header):
        self.calls = []
        self._fault, self._factor, self._noise = fault, factor, noise
        self._random = np.random.default_rng(7)
        start = np.random.default_rng(1).standard_normal((4, WIDTH))
        self._module(tree, "m", start, 0)
        self.capture = capture(self.calls, **header)

    def _maybe(self, path, place, x):
        return x * self._factor if (path, place) == self._fault else x

    def _module(self, tree, path, x, depth):
        y = x
        for number, inner in enumerate(tree):
            y = self._maybe(path, number, y)
            y = self._module(inner, f"{path}.{number}", y, depth + 1)
        if tree:
            y = y + x  # a residual connection: the parent's own code
        else:
            rng = np.random.default_rng(len(path) * 31 + sum(map(ord, path)))
            weight = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
            y = np.tanh(x @ weight)
            y = y + self._noise * self._random.standard_normal(y.shape)
        y = self._maybe(path, "output", y)
        self.calls.append((module(path), depth, {"input_args.0": x}, {"output.0": y}))
        return y


@st.composite
def planted(draw):
    """A tree and a fault: in a leaf, behind a parent's children, or before one."""
    tree = draw(TREES)
    path, children = draw(st.sampled_from(list(paths_of(tree))))
    places = ["output", *range(children)]
    place = draw(st.sampled_from(places))
    if (path, place) == ("m", 0):
        place = "output"  # at the root's start it cannot be told from other inputs
    return tree, (path, place)


@settings(max_examples=150, deadline=None)
@given(planted(), st.sampled_from([1.01, 1.2, -1.0]))
def test_the_fault_is_named_where_it_is(plant, factor):
    """The deepest module whose own code is guilty is named, with the same key."""
    tree, fault = plant
    golden = Run(tree).capture
    candidate = Run(tree, fault=fault, factor=factor).capture

    divergence = judge(golden, candidate).verdict.divergence

    assert (divergence.kind, divergence.module) == ("origin", fault[0])
    handed = isinstance(fault[1], int)
    assert bool(divergence.between) == handed


@settings(max_examples=150, deadline=None)
@given(planted())
def test_the_fault_is_named_across_keys(plant):
    """With noise in every module and another key a large fault is named as well."""
    tree, fault = plant
    golden = Run(tree, key=OTHER_KEY).capture
    candidate = Run(tree, fault=fault, factor=3.0, noise=1e-3).capture

    divergence = judge(golden, candidate).verdict.divergence

    assert (divergence.kind, divergence.module) == ("origin", fault[0])


@settings(max_examples=150, deadline=None)
@given(TREES, st.floats(0.5e-3, 0.1))
def test_noise_accuses_no_parent(tree, noise):
    """Where every leaf is a bit off, code that only adds up is no origin."""
    golden = Run(tree).capture
    candidate = Run(tree, noise=noise).capture

    divergence = judge(golden, candidate).verdict.divergence

    if divergence is not None:
        assert dict(paths_of(tree))[divergence.module] == 0, divergence


@settings(max_examples=100, deadline=None)
@given(planted())
def test_a_fault_in_a_module_that_is_not_judged_is_named(plant):
    """A leaf whose rows are ignored is named where anything judged comes of it."""
    tree, (path, _) = plant
    leaf = next(p for p, n in paths_of(tree) if p.startswith(path) and not n)
    rule = Rule("r", rows=f"Module.{leaf}.M.*", ignore=True)
    golden = Run(tree).capture
    candidate = Run(tree, fault=(leaf, "output")).capture

    verdict = judge(golden, candidate, [rule]).verdict

    around = leaf.rpartition(".")[0]
    size = dict(paths_of(tree))[around]
    is_last = leaf == f"{around}.{size - 1}"
    if is_last:  # what its parent makes of it, no other module was given
        assert verdict.divergence.module == around
    else:
        assert verdict.divergence.module == leaf
