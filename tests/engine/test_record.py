# SPDX-License-Identifier: Apache-2.0
"""`msprobe.record`: engines of other configurations and environments, A against B."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fixture import Project

BODY = """
PROMPT = "the first layer to differ is the one to look at"

def test_environments(msprobe):
    a = msprobe.record(PROMPT, GREEDY)
    b = msprobe.record(PROMPT, GREEDY, python={python!r})
    b.check(against=a)
    a.check_against_transformers()
    wide = msprobe.record(PROMPT, GREEDY, engine={{"dtype": "float32"}}, name="wide")
    wide.check(against=a)
    changes = {{"hf_overrides": {{"rms_norm_eps": 0.01}}}}
    fault = msprobe.record(PROMPT, GREEDY, engine=changes, name="fault")
    with pytest.raises(pytest.fail.Exception, match="^model.layers.0.input_layernorm"):
        fault.check(against=a)
    with pytest.raises(pytest.fail.Exception, match="^model.layers.0.input_layernorm"):
        fault.check_against_transformers()

def test_broken(msprobe):
    msprobe.record(PROMPT, GREEDY, engine={{"max_model_len": -5}})
"""


@pytest.fixture
def other_python(tmp_path):
    """Interpreter of another environment: vLLM is there, this package is not."""
    folder = tmp_path / "other"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True
    )
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = folder / "bin" / "python"
    command = [str(python), "-P", "-c", "import vllm, pytest_msprobe"]
    done = subprocess.run(
        command, env={}, capture_output=True, text=True, check=False, cwd=folder
    )
    assert "No module named 'pytest_msprobe'" in done.stderr
    return str(python)


def test_two_environments_of_one_test(demo_model, tmp_path, other_python):
    """Engines in their own processes are judged against each other without a golden."""
    project = Project(tmp_path)
    project.write(BODY.format(python=other_python))

    done = project.run()

    text = done.stdout
    assert "1 failed, 1 passed" in text, text
    assert "test_environments: pass: " in text
    assert "test_environments: changed: " in text
    assert "not the same: model.dtype" in text
    assert "FAILED test_project.py::test_broken - in a process of its own" in text
    assert "Traceback" not in text
    assert "R is the error relative to that of transformers in bfloat16" in text
    (run,) = (tmp_path / ".msprobe" / "runs").iterdir()
    names = sorted(path.name for path in run.rglob("test_environments@fault/verdict*"))
    assert names == ["verdict.json", "verdict.transformers.json"]
    assert not project.goldens()
