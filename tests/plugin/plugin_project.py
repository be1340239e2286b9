# SPDX-License-Identifier: Apache-2.0
"""A user's project whose engine is the double in vllm_double: no model, no vLLM."""

import os
import shlex
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONFIG = "engine: {model: any}\n"
# Children start three times as fast without the plugins of this environment.
ADDOPTS = " ".join(
    f"-p no:{name}"
    for name in (
        "cacheprovider",
        "hypothesispytest",
        "cov",
        "xdist",
        "anyio",
        "timeout",
    )
)


class PluginProject:
    """A project in pytester's folder, run in processes of its own."""

    def __init__(self, pytester, monkeypatch):
        self.pytester = pytester
        self.folder = pytester.path
        monkeypatch.delenv("CI", raising=False)
        paths = [HERE / "vllm_double", HERE.parent, os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(str(path) for path in paths if str(path))
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("COLUMNS", "200")  # so that no summary line is cut
        monkeypatch.setenv("PYTEST_ADDOPTS", ADDOPTS)
        self.configure(CONFIG)

    def configure(self, text):
        """Writes the configuration."""
        (self.folder / "msprobe.yaml").write_text(text)

    def write(self, text, name="test_project.py"):
        """Writes a test file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import pytest\nfrom vllm import LLM\n\n" + text)

    def run(self, *arguments, config="msprobe.yaml"):
        """Runs pytest with the configuration."""
        options = ["--msprobe-config", config] if config else []
        return self.pytester.runpytest_subprocess(*options, *arguments)

    def run_command(self, command):
        """Runs a command that a message has printed."""
        program, *arguments = shlex.split(command)
        assert program == "pytest"
        return self.pytester.runpytest_subprocess(*arguments)

    def record(self, *arguments):
        """Writes the goldens of all tests, which must pass."""
        result = self.run("--msprobe-update=new", *arguments)
        assert result.ret == 0, result.stdout.str()
        return result

    def goldens(self):
        """Paths in the golden tree."""
        root = self.folder / "golden"
        return sorted(str(p.relative_to(root)) for p in root.rglob("*.jsonl"))


def text_of(result):
    """All that a run printed."""
    return f"{result.stdout.str()}\n{result.stderr.str()}"


def assert_failed(result, *phrases, **outcomes):
    """Exit code 1 with these outcomes and phrases, without a traceback of ours."""
    text = text_of(result)
    assert result.ret == pytest.ExitCode.TESTS_FAILED, text
    assert "Traceback" not in text
    assert "pytest_msprobe/" not in text
    result.assert_outcomes(**outcomes)
    for phrase in phrases:
        assert phrase in text


def assert_usage_error(result, *phrases):
    """Exit code 4, one error line with these phrases, no traceback."""
    text = text_of(result)
    assert result.ret == pytest.ExitCode.USAGE_ERROR, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("ERROR:")]
    assert len(lines) == 1, text
    for phrase in phrases:
        assert phrase in lines[0]
