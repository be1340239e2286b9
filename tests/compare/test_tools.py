# SPDX-License-Identifier: Apache-2.0
"""The helper that asserts a planted fault."""

import numpy as np
import pytest
import tools
from captures import Network, capture, module, request

NETWORK = Network()


def test_a_change_must_be_there():
    """A fault that moved nothing at its place is no fault."""
    golden = NETWORK.run()

    tools.assert_changed(golden, NETWORK.run(after="b.x"), "b.x")
    with pytest.raises(AssertionError):
        tools.assert_changed(golden, NETWORK.run(after="c"), "b.x")


def test_inputs_must_be_equal_if_asked():
    """A fault of a module leaves its inputs; one that lies before it does not."""
    golden = NETWORK.run()

    tools.assert_changed(golden, NETWORK.run(after="b.x"), "b.x", inputs_equal=True)
    tools.assert_changed(golden, NETWORK.run(after="b.x"), "b", inputs_equal=True)
    tools.assert_changed(golden, NETWORK.run(after="a"), "b.x")
    with pytest.raises(AssertionError, match=r"b\.x.*input_args\.0"):
        tools.assert_changed(golden, NETWORK.run(after="a"), "b.x", inputs_equal=True)


def test_modules_without_inputs_cannot_be_checked():
    """Nothing to compare is not the same as equal."""
    golden, candidate = (
        capture([(module("m"), 0, {}, {"output.0": np.ones((2, 2)) * n})])
        for n in (1, 2)
    )

    with pytest.raises(AssertionError, match="no inputs"):
        tools.assert_changed(golden, candidate, "m", inputs_equal=True)


def test_inputs_behind_a_flip_may_differ():
    """A fault that flips a token changes later inputs of the same module."""

    def make(value, token):
        x = np.ones((2, 4))
        fed = [("0.prompt", x), ("0.g1", x), ("0.g2", x * value)]
        calls = [(module("m"), 0, {"input_args.0": fed}, {"output.0": x * value})]
        return capture(calls, requests=[request((5, token, 7), (-0.1,) * 3)])

    tools.assert_changed(make(1, 6), make(2, 9), "m", inputs_equal=True)
    with pytest.raises(AssertionError, match=r"@0\.g2"):
        tools.assert_changed(make(1, 6), make(2, 6), "m", inputs_equal=True)
