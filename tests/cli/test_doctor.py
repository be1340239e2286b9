# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe doctor --env`."""

import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pytest_msprobe.compat import has_module
from pytest_msprobe.engine.doctor import runner_choice
from pytest_msprobe.engine.preflight import (
    check_folder,
    environment_problems,
    is_eager,
)
from pytest_msprobe.errors import CaptureError

pytestmark = pytest.mark.skipif(not has_module("vllm"), reason="vLLM is not installed")


def run(**variables):
    """The command's exit code and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest_msprobe.cli.main", "doctor", "--env"],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_a_healthy_environment():
    """Versions, runner, key, entry point and disk are listed, and nothing is wrong."""
    code, text = run()

    assert code == 0, text
    facts = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    names = ("torch", "vllm", "platform", "model runner", "numerics key", "attention")
    for name in (*names, "entry point", "CI", "free disk"):
        assert facts[name].strip(), name
    assert facts["model runner"].strip().startswith(("V1: ", "V2: "))
    assert text.rstrip().endswith("captures can be made here")


def test_the_report_is_quick():
    """It takes less than ten seconds of a processor, and no compiler is imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    program = """
import sys
from pytest_msprobe.engine.doctor import main
main()
print("torch._inductor" in sys.modules, "vllm.v1.engine" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_what_will_not_run_is_named():
    """Settings with which vLLM would fail are found before an engine is started."""
    code, text = run(
        VLLM_PLUGINS="other",
        VLLM_BATCH_INVARIANT="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
    )

    assert code == 1
    problems = [line for line in text.splitlines() if line.startswith("PROBLEM: ")]
    assert any("VLLM_PLUGINS='other'" in line for line in problems)
    if "CPU_ATTN" in text:
        assert any("VLLM_BATCH_INVARIANT=1" in line for line in problems)


@pytest.mark.parametrize(
    ("version", "has_triton", "requested", "expected"),
    [
        ("0.32.0", False, None, "V1"),
        ("0.32.0", True, None, "V2"),
        ("0.25.1", True, None, "V2"),
        ("0.20.2", True, None, "V1"),
        ("0.32.0", True, "0", "V1"),
        ("0.20.2", True, "1", "V2"),
    ],
)
def test_choice_of_the_model_runner(version, has_triton, requested, expected):
    """The runner follows the variable, then Triton, then vLLM's version."""
    assert runner_choice(version, has_triton=has_triton, requested=requested)[0] == (
        expected
    )


def test_problems_of_the_cpu(monkeypatch):
    """Batch invariance and model runner V2 are refused where they cannot work."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    slugs = [p.slug for p in environment_problems(device="cpu", has_triton=False)]
    assert slugs == ["batch-invariant", "no-triton"]
    assert environment_problems(device="cuda", has_triton=True) == []


def test_a_disk_that_is_nearly_full_is_found_before_a_capture(tmp_path, monkeypatch):
    """With little free space a capture is refused with the folder and the number."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))

    with pytest.raises(CaptureError, match=r"dump: 4096 bytes free, at least \d+ are"):
        check_folder(tmp_path / "dump")


class Config:
    """A configuration of vLLM with these settings."""

    def __init__(self, enforce_eager, mode, graphs):
        self.model_config = type("M", (), {"enforce_eager": enforce_eager})()
        self.compilation_config = type(
            "C", (), {"mode": mode, "cudagraph_mode": graphs}
        )


class Name:
    """A member of an enumeration."""

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(
    ("enforce_eager", "mode", "graphs", "expected"),
    [
        (True, Name("VLLM_COMPILE"), Name("FULL"), True),
        (False, Name("NONE"), Name("NONE"), True),
        (False, Name("VLLM_COMPILE"), Name("NONE"), False),
        (False, Name("NONE"), Name("PIECEWISE"), False),
        (False, 0, None, True),
        (False, 3, None, False),
    ],
)
def test_what_counts_as_eager(enforce_eager, mode, graphs, expected):
    """An engine is eager if asked to be, or if it neither compiles nor uses graphs."""
    assert is_eager(Config(enforce_eager, mode, graphs)) is expected
