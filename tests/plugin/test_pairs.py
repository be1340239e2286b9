# SPDX-License-Identifier: Apache-2.0
"""`check(against=...)`: A against B in one test, no golden."""

import json
import sys

import pytest
from plugin_project import PluginProject, assert_failed, text_of

PAIR = """
def test_pair(msprobe):
    llm_a, llm_b = LLM(), LLM()
    with msprobe.capture(llm_a) as a:
        llm_a.generate()
    with msprobe.capture(llm_b) as b:
        llm_b.generate({})
    b.check(against=a)
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose tests are to be written."""
    return PluginProject(pytester, monkeypatch)


def test_equal_engines_pass_without_a_golden(project):
    """Two engines that compute the same pass, and neither asks for a golden."""
    project.write(PAIR.format(""))

    result = project.run()

    assert result.ret == 0, text_of(result)
    assert "in the place of a golden" in text_of(result)
    assert project.goldens() == []


def test_other_engine_fails_with_the_same_report(project):
    """An engine that computes something else fails naming its module."""
    project.write(PAIR.format("factor=1.5"))

    assert_failed(
        project.run(),
        "FAILED test_project.py::test_pair - layer: first to compute something else",
        "in the place of a golden",
        failed=1,
    )


def test_update_writes_no_golden_for_either(project):
    """An update leaves A and B alone: a failing pair still fails."""
    project.write(PAIR.format("factor=1.5"))

    assert_failed(project.run("--msprobe-update=all"), failed=1)
    assert project.goldens() == []


def test_saved_pair_is_judged_again(project):
    """`pytest-msprobe check` of a run judges the pair again."""
    project.write(PAIR.format("factor=1.5"))
    project.run()
    (run,) = (project.folder / ".msprobe" / "runs").iterdir()
    (path,) = run.rglob("verdict*.json")

    command = [sys.executable, "-m", "pytest_msprobe.cli.main", "check", str(run)]
    result = project.pytester.run(*command)

    assert json.loads(path.read_text())["status"] == "fail"
    assert result.ret == 1
    assert "layer: first to compute something else" in text_of(result)
    assert "in the place of a golden" in text_of(result)


def test_marker_tolerances_hold_for_a_pair(project):
    """Tolerances of the test apply between its captures."""
    limits = dict.fromkeys(("rel_l2", "max", "min", "norm", "mean"), 0.9)
    marker = f"@pytest.mark.msprobe(tolerances={limits})"
    project.write(marker + PAIR.format("factor=1.5"))

    result = project.run()

    assert result.ret == 0, text_of(result)


def test_capture_is_not_checked_against_itself(project):
    """A capture is no reference of its own."""
    project.write(PAIR.format("").replace("against=a", "against=b"))

    assert_failed(project.run(), "a capture checked against itself", failed=1)


def test_unequal_ranks_need_level_l0_of_all_ranks(project):
    """Unequal numbers of ranks are combined, or one line says why they cannot be."""
    project.write(PAIR.format("").replace("LLM(), LLM()", "LLM(ranks=2), LLM()"))

    assert_failed(
        project.run(), "check(against=...) of captures with unequal", failed=1
    )
