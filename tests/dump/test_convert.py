# SPDX-License-Identifier: Apache-2.0
"""Dumps as captures."""

import json

import pytest

from pytest_msprobe.dump.convert import dump_capture
from pytest_msprobe.dump.reader import read_dump

MODULE = "Module.embed.Embedding.backward.0"
FUNCTION = "Functional.embedding.0.backward"


def capture_of(folder, order, parent):
    """A dump with the backward of a module and of the function in it."""
    leaf = {
        "type": "torch.Tensor", "dtype": "torch.float32", "shape": [2],
        "Max": 1.0, "Min": 0.0, "Mean": 0.5, "Norm": 1.0, "requires_grad": False,
    }  # fmt: skip
    record = {"input": [leaf], "output": [leaf]}
    forward = "Functional.embedding.0.forward"
    data = {forward: {"input_args": [leaf], "input_kwargs": {}, "output": [leaf]}}
    data |= dict.fromkeys(order, record)
    parents = {forward: MODULE.replace("backward", "forward"), FUNCTION: parent}
    folder.mkdir()
    (folder / "dump.json").write_text(
        json.dumps({"task": "statistics", "level": "mix", "data": data})
    )
    (folder / "construct.json").write_text(json.dumps(parents))
    return dump_capture({0: read_dump(folder / "dump.json")})


@pytest.mark.parametrize("parent", [None, MODULE])
def test_a_late_backward_stands_in_the_module_of_its_forward(tmp_path, parent):
    """Whether or not the module's ended before, a backward is that of its child."""
    late = capture_of(tmp_path / "late", (MODULE, FUNCTION), parent)
    early = capture_of(tmp_path / "early", (FUNCTION, MODULE), MODULE)

    found = [[(call.c, call.l) for _, call in side.calls()] for side in (late, early)]

    assert found[0] == found[1]
    assert found[0][-2:] == [(FUNCTION, 1), (MODULE, 0)]
