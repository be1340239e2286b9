# SPDX-License-Identifier: Apache-2.0
"""The same commands under another instruction set, in processes of their own."""

import subprocess
import sys

import capped
import tools

FAULT = "model.layers.2.post_attention_layernorm"


def run_capped(*arguments, **environment):
    """Runs pytest with the instruction set capped to AVX2."""
    variables = tools.clean_environment(
        **tools.ENVIRONMENT,
        **capped.ENVIRONMENT,
        PYTHONPATH=str(tools.ROOT / "tests"),
        **environment,
    )
    command = [sys.executable, "-m", "pytest", "-p", "capped", *arguments]
    return subprocess.run(
        command,
        cwd=tools.ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_cross_key_tests_pass_capped(demo_model):
    """Committed goldens pass under AVX2, and large faults are caught and named."""
    done = run_capped("tests/cross", "-q", "-rs")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_demo_passes_capped(demo_model):
    """The demo is green under AVX2 and says that the golden has another key."""
    done = run_capped("--msprobe-config", "msprobe.yaml", "examples", "-q")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "golden of another key" in done.stdout


def test_demo_fails_capped_with_a_fault(demo_model):
    """The demo's planted fault is named under AVX2 as well, and the mode is stated."""
    done = run_capped(
        "--msprobe-config", "msprobe.yaml", "examples", "-q", MSPROBE_DEMO_FAULT=FAULT
    )

    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(FAULT))
    assert any("only module outputs" in line for line in lines[first : first + 4])
