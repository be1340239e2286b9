# SPDX-License-Identifier: Apache-2.0
"""An installed plugin costs nothing where it is not used."""

import subprocess
import sys

import pytest
import tools

HEAVY = ("torch", "vllm", "numpy", "numba", "yaml", "jinja2", "rich", "msgspec")


def test_unused_plugin_imports_nothing_heavy(tmp_path):
    """A pytest run that does not use the plugin imports none of the heavy modules."""
    (tmp_path / "test_a.py").write_text(
        "import sys\n\n\ndef test_a():\n"
        "    assert 'pytest_msprobe.plugin' in sys.modules\n"
        f"    assert not set({HEAVY!r}) & set(sys.modules)\n"
    )

    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=tmp_path,
        env=tools.clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pytest" in imported
    assert not [name for name in HEAVY if name in imported]
    assert "msprobe" not in done.stdout


@pytest.mark.parametrize(
    "module",
    ["compare.judge", "golden.store", "report.terminal", "report.html", "cli.main"],
)
def test_judging_needs_no_torch(module):
    """Judging, goldens, reports and the command import neither torch nor vLLM."""
    code = (
        f"import sys, pytest_msprobe.{module}\n"
        "sys.exit(bool({'torch', 'vllm', 'numba'} & set(sys.modules)))"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_vllm_entry_point_imports_nothing_heavy():
    """The entry point that vLLM calls in every process imports only itself."""
    code = (
        "import sys\nfrom pytest_msprobe.vllm_entry import register\nregister()\n"
        "sys.exit(bool({'torch', 'numpy', 'msgspec', 'yaml'} & set(sys.modules)))"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_torch_is_said_clearly():
    """Without torch the debugger's import says what is missing and what to do."""
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "gone = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        "importlib.util.find_spec = gone\n"
        "from pytest_msprobe import PrecisionDebugger\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "torch is not installed in this environment" in done.stderr
    assert "chooses none" in done.stderr
