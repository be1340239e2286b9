# SPDX-License-Identifier: Apache-2.0
"""A failing L0 test of a real engine is narrowed down to the operator."""

import subprocess
import sys

import tools
from test_fixture import Project

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


def test_operator_is_named(demo_model, tmp_path):
    """The operator of the user's kernel is named, with the module around it."""
    project = Project(tmp_path)
    project.write(TEST)
    kernel = tmp_path / "kernel.py"
    kernel.write_text(KERNEL.format(factor=1.0))
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a commit -qm x"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    kernel.write_text(KERNEL.format(factor=1.02))

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest_msprobe.cli.main", "narrow"),
            *("test_project.py::test_kernel", "--good", "HEAD"),
            *("--msprobe-config", "msprobe.yaml"),
        ],
        cwd=tmp_path,
        env=tools.clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    headline = done.stdout.splitlines()[1]
    assert headline.startswith("model.layers.1.mlp.act_fn: first to compute something")
    assert " in Torch.mul." in headline
