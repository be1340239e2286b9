# SPDX-License-Identifier: Apache-2.0
"""A failing L0 test of a real engine is narrowed down to the operator."""

import subprocess
import sys

import pytest
import tools
from test_fixture import Project

# The key `load` of the debugger, which gives modules the inputs of another run.
pytest.importorskip("pytest_msprobe.debugger.load")

KERNEL = """
import torch

def silu_and_mul(x):
    gate, up = x.chunk(2, dim=-1)
    scaled = torch.mul(gate, {factor})
    return torch.sigmoid(scaled) * gate * up
"""
TEST = """
import kernel

def test_kernel(msprobe_engine, msprobe):
    worker = msprobe_engine.llm_engine.model_executor.driver_worker.worker
    layer = worker.model_runner.get_model().model.layers[1]
    layer.mlp.act_fn.forward = kernel.silu_and_mul
    try:
        with msprobe.capture(msprobe_engine):
            run(msprobe_engine)
    finally:
        del layer.mlp.act_fn.forward
"""


@pytest.fixture(scope="module")
def repository(demo_model, tmp_path_factory):
    """A repository whose committed kernel is right and whose present one is wrong."""
    folder = tmp_path_factory.mktemp("repository")
    Project(folder).write(TEST)
    kernel = folder / "kernel.py"
    kernel.write_text(KERNEL.format(factor=1.0))
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a commit -qm x"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    kernel.write_text(KERNEL.format(factor=1.02))
    return folder


def test_operator_is_named_and_own_errors_told(repository):
    """The user's operator is named; with good inputs only its module is off."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest_msprobe.cli.main", "narrow"),
            *("test_project.py::test_kernel", "--good", "HEAD", "--replay"),
            *("--msprobe-config", "msprobe.yaml"),
        ],
        cwd=repository,
        env=tools.clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    text = done.stdout
    assert done.returncode == 1, text + done.stderr
    headline = text.splitlines()[1]
    assert headline.startswith("model.layers.1.mlp.act_fn: first to compute something")
    assert " in Torch.mul." in headline
    _, _, table = text.partition("module\n")
    errors = {
        name: (own, whole) for own, whole, name in map(str.split, table.splitlines())
    }
    guilty = errors.pop("model.layers.1.mlp.act_fn")
    assert guilty[0] == guilty[1] != "0"
    assert len(errors) > 10
    assert {own for own, _ in errors.values()} == {"0"}
    assert all(whole != "0" for _, whole in errors.values())
