# SPDX-License-Identifier: Apache-2.0
"""Plants a numeric fault into the engine, if MSPROBE_DEMO_FAULT names a module.

The demo runs the same tests twice, the second time with this fault: a normalisation
with another epsilon, a slip that no crash and often no output text betrays.
"""

import os

import pytest

EPSILON = 1e-3


@pytest.fixture(autouse=True)
def planted_fault(msprobe_engine):
    """Another epsilon in the module named, for the time of a test."""
    path = os.environ.get("MSPROBE_DEMO_FAULT")
    if not path:
        yield
        return
    before = msprobe_engine.apply_model(
        lambda model: _set_epsilon(model, path, EPSILON)
    )
    yield
    msprobe_engine.apply_model(lambda model: _set_epsilon(model, path, before[0]))


def _set_epsilon(model, path, value):
    """Sets a normalisation's epsilon and returns the one it had."""
    norm = model.get_submodule(path)
    before = norm.variance_epsilon
    norm.variance_epsilon = value
    return before
