# SPDX-License-Identifier: Apache-2.0
"""A module's own error apart from the one that it inherits."""

from captures import Network, module

from pytest_msprobe.compare.replay import OwnError, own_errors, suspicious_modules

NETWORK = Network()


def test_innermost_modules_that_differ_are_suspicious():
    """Modules with other outputs are listed in order, those around them are not."""
    names = suspicious_modules(NETWORK.run(), NETWORK.run(after="b.x"))

    assert names == [module("b.x"), module("b.y"), module("c")]
    assert suspicious_modules(NETWORK.run(), NETWORK.run()) == []


def test_own_error_is_what_good_inputs_leave():
    """The guilty module keeps its error with good inputs; the others lose theirs."""
    good, bad = NETWORK.run(), NETWORK.run(after="b.x")
    replayed = NETWORK.run()
    for side in (bad, replayed):
        for _, call in side.calls():
            if call.c == module("b.x"):
                number = call.o["output.0"][0]
    replayed.tensors[number] = bad.tensors[number]
    names = suspicious_modules(good, bad)

    first, *others = own_errors(good, bad, replayed, names)

    assert first.call == module("b.x")
    assert first.own == first.whole > 0.04
    assert all(isinstance(error, OwnError) for error in others)
    assert [error.own for error in others] == [0.0, 0.0]
    assert all(error.whole > 0.01 for error in others)
