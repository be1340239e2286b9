# SPDX-License-Identifier: Apache-2.0
"""seed_all."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from pytest_msprobe import seed_all
from pytest_msprobe.errors import ConfigError


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Puts back what a test changes."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    names = ("dropout", "dropout2d", "dropout3d")
    originals = [getattr(torch.nn.functional, name) for name in names]
    yield
    torch.use_deterministic_algorithms(False)
    for name, original in zip(names, originals, strict=True):
        setattr(torch.nn.functional, name, original)


def draw():
    """One number of each generator."""
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002, S311


def test_seed_repeats_all_generators():
    """The same seed gives the same numbers of random, numpy and torch."""
    seed_all(7)
    first = draw()
    seed_all(7)

    assert draw() == first
    assert os.environ["PYTHONHASHSEED"] == "7"


def test_mode_sets_deterministic_algorithms():
    """Mode goes to torch, and False switches it off."""
    seed_all(mode=True)
    assert torch.are_deterministic_algorithms_enabled()

    seed_all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_dropout_can_be_removed():
    """rm_dropout makes dropout drop nothing."""
    seed_all(rm_dropout=True)
    seed_all(rm_dropout=True)
    x = torch.ones(100)

    assert torch.nn.functional.dropout(x, 0.9).equal(x)
    assert torch.nn.Dropout(0.9).train()(x).equal(x)


@pytest.mark.parametrize(
    "arguments",
    [{"seed": -1}, {"seed": 2**32}, {"seed": "1"}, {"seed": True}, {"mode": 1},
     {"rm_dropout": None}, {"is_enhanced": 1}],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments):
    """A wrong type or range names the argument."""
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        seed_all(**arguments)


def test_every_call_can_give_the_same():
    """is_enhanced seeds before each call, in random, numpy and torch."""
    program = """
import random, numpy, torch
from pytest_msprobe import seed_all
seed_all(5, is_enhanced=True)
seed_all(7, is_enhanced=True)
draws = (
    lambda: random.random(), lambda: random.randint(0, 10**9),
    lambda: numpy.random.rand(3).tolist(), lambda: numpy.random.permutation(9).tolist(),
    lambda: torch.rand(3).tolist(), lambda: torch.randperm(9).tolist(),
    lambda: torch.empty(3).normal_().tolist(),
)
for draw in draws:
    assert draw() == draw()
first = torch.rand(1).item()
seed_all(8, is_enhanced=True)
assert torch.rand(1).item() != first
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
