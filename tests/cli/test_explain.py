# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe explain`: what decides a test or a row."""

import subprocess
import time

import pytest
from captures import Network

from pytest_msprobe.cli.main import main
from pytest_msprobe.golden.store import golden_bytes

RULES = """\
engine: {model: any}
tolerances:
  rules:
    - {rows: "*b.y*", rel_l2: 0.5}
    - {rows: "*.c.*", max: 0.5, mode: cross}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one golden, in a git repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "msprobe.yaml").write_text(RULES)
    folder = tmp_path / "golden" / "test_a.py" / "test_one"
    folder.mkdir(parents=True)
    capture = Network().run(provenance={"vllm": "1.2.3"})
    for line in list(capture.tensors.values())[-2:]:
        line.n = [1e-3] * 5
    content = golden_bytes(capture, "test_a.py::test_one", capture.header.key)
    (folder / "cpu-avx2-amd.jsonl").write_bytes(content)
    git = ["git", "-c", "user.name=Someone", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Record it"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_a_test_is_explained(project, capsys):
    """Key, provenance, history of the golden and the rules with their lines."""
    start = time.perf_counter()
    assert main(["explain", "test_a.py::test_one"]) == 0
    assert time.perf_counter() - start < 2

    text = capsys.readouterr().out
    assert "numerics key: cpu-avx2-amd" in text
    assert "vllm: 1.2.3" in text
    assert "Someone: Record it" in text
    assert "msprobe.yaml:4: rows '*b.y*', rel_l2 0.5 (2 rows)" in text


@pytest.mark.parametrize(
    "arguments",
    [["test_one", "Module.b.y.*output*"], ["Module.b.y.M.forward.0.output.0"]],
)
def test_a_row_is_explained(project, capsys, arguments):
    """The chain of rules that its limits come from, in the order they apply in."""
    assert main(["explain", *arguments]) == 0

    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Module.b.y.M.forward.0.output.0@0.prompt"
    chain = [line.partition(": ")[0] for line in lines[5:]]
    moved = "default, where it was scheduled differently"
    assert chain[:3] == ["default", moved, "msprobe.yaml:4"]
    assert f"{moved}: rel_l2 0.02, max 0.02" in "\n".join(lines)
    assert sum(line.startswith("msprobe.yaml:4") for line in lines) == 2
    assert not any(line.startswith("msprobe.yaml:5") for line in lines)


def test_noise_is_part_of_the_chain(project, capsys):
    """A calibrated row says how far its noise raises its limits."""
    assert main(["explain", "test_one", "*model.M*"]) == 0

    assert "noise x4, where it is larger: rel_l2 0.004" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["test_two"], "tests with goldens: test_a.py::test_one"),
        (["test_one", "*zzz*"], "the nearest rows are Module."),
        (["test_one", "--msprobe-config", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_what_is_not_there_is_told(project, capsys, arguments, phrase):
    """An unknown test, row or file is exit code 4 with the nearest known one."""
    assert main(["explain", *arguments]) == 4
    assert phrase in capsys.readouterr().err


def test_without_a_configuration_it_is_asked_for(tmp_path, monkeypatch, capsys):
    """Where no configuration lies, the message names the option."""
    monkeypatch.chdir(tmp_path)

    assert main(["explain", "test_one"]) == 4
    assert "--msprobe-config FILE" in capsys.readouterr().err


def test_history_outside_a_repository(project, capsys):
    """A golden that git does not know says so."""
    folder = project / "golden" / "test_a.py" / "test_one"
    (folder / "cpu-avx2-amd.jsonl").rename(folder / "other.jsonl")

    assert main(["explain", "test_one"]) == 0
    assert "not committed" in capsys.readouterr().out
