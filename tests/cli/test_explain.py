# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe explain`: what decides a test or a row."""

import subprocess
import time

import numpy as np
import pytest
from captures import Network, capture

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
    assert "default, same key: rel_l2 0.001, max 0.001" in text
    assert "default, another key: rel_l2 0.05, max 0.06" in text


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
    assert sum(line.endswith("0.00015 is added to rel_l2") for line in lines) == 2
    assert "numerics key: cpu-avx2-amd, rank 0 of 1" in lines
    assert "vllm: 1.2.3" in lines
    assert any("Someone: Record it" in line for line in lines)


def test_what_no_limit_is_for_says_so(tmp_path, monkeypatch, capsys):
    """Integers have no tolerance; across keys inputs and operators are not judged."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "golden" / "test_a.py" / "test_one"
    folder.mkdir(parents=True)
    rules = "engine: {model: any}\ntolerances: {rules: [{rows: '*', ignore: true}]}\n"
    (tmp_path / "msprobe.yaml").write_text(rules)
    slots = {"input_args.0": np.ones((4, 2))}, {"output.0": np.arange(4)}
    choice = ("Module.e.choice.ExpertChoice.forward.0", 0, {}, slots[1])
    found = capture([("Module.a.M.forward.0", 0, *slots), choice])
    content = golden_bytes(found, "test_a.py::test_one", found.header.key)
    (folder / "cpu-avx2-amd.jsonl").write_bytes(content)

    assert main(["explain", "test_one", "*.a.*output*"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines.count("integers must be equal, no tolerance applies") == 2
    assert lines.count("msprobe.yaml:2: rows '*', ignore") == 2
    assert not any(line.startswith("default") for line in lines)
    assert main(["explain", "test_one", "*input*"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines.count("not judged: with another key only outputs of modules are") == 1
    assert main(["explain", "test_one", "*choice*"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines.count("integers must be equal, no tolerance applies") == 1
    assert lines.count("what depends on another choice is not judged; tokens are") == 1


def test_noise_is_part_of_the_chain(project, capsys):
    """A calibrated row says how far its noise raises its limits."""
    assert main(["explain", "test_one", "*model.M*"]) == 0

    assert "noise x4, where it is larger: rel_l2 0.004" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["test_two"], "tests with goldens: test_a.py::test_one"),
        (["b.y.M.forward*"], "the nearest rows are Module."),
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


def test_few_elements_widen_the_defaults(tmp_path, monkeypatch, capsys):
    """Norms and means of few elements say what they may be off by, if by default."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "golden" / "test_a.py" / "test_one"
    folder.mkdir(parents=True)
    few = [("0.prompt", np.ones((4, 1))), ("0.g1", np.full((1, 1), 0.1))]
    outputs = {"output.0": few, "output.1": np.ones((4, 8))}
    found = capture([("Module.gate.M.forward.0", 0, {}, outputs)])
    content = golden_bytes(found, "test_a.py::test_one", found.header.key)
    (folder / "cpu-avx2-amd.jsonl").write_bytes(content)
    widened = "of 4 elements: at least rel_l2 / sqrt(elements): norm 0.025, mean 0.025"

    def explained(rule, row):
        rules = f"engine: {{model: any}}\ntolerances: {{rules: [{rule}]}}\n"
        (tmp_path / "msprobe.yaml").write_text(rules)
        assert main(["explain", row]) == 0
        return [line.strip() for line in capsys.readouterr().out.splitlines()]

    lines = explained('{rows: "*", max: 0.5}', "output.0@0.prompt")
    assert lines.count(widened) == 1
    assert lines[lines.index(widened) - 1].startswith("default: rel_l2 0.05")
    assert widened not in explained('{rows: "*", max: 0.5}', "output.1@0.prompt")
    assert widened not in explained('{rows: "*", rel_l2: 0.01}', "output.0@0.prompt")
    assert not any("errors are relative" in line for line in lines)
    gate = explained('{rows: "*", max: 0.5}', "output.0@0.g1")
    relative = "of 1 element: errors are relative to 0.895545"
    assert gate.count(relative) == 1
    assert gate.count(f"{relative}, where it was scheduled differently") == 1
    narrow = explained('{rows: "*", norm: 0.02}', "output.0@0.prompt")
    assert any(line.endswith("sqrt(elements): mean 0.025") for line in narrow)
