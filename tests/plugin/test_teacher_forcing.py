# SPDX-License-Identifier: Apache-2.0
"""Feeding back tokens: of the golden by a setting, of another capture by `follow`."""

import sys

import pytest
from plugin_project import PluginProject, assert_failed, text_of

TEST = """
def test_a(msprobe):
    llm = LLM()
    with msprobe.capture(llm):
        print("returned", llm.generate(tokens={}))
"""
FORCED = "engine: {model: any}\ngolden: {teacher_forcing: true}\n"
FED = "the golden's tokens were fed back"


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose golden has the tokens 5 and 6."""
    project = PluginProject(pytester, monkeypatch)
    project.write(TEST.format("(5, 6)"))
    project.record()
    return project


@pytest.mark.parametrize("by_marker", [True, False])
def test_tokens_of_the_golden_are_fed_back(project, by_marker):
    """Whether the configuration or a marker asks for it, generate returns them."""
    text = TEST.format("(5, 9)")
    if by_marker:
        text = "@pytest.mark.msprobe(teacher_forcing=True)" + text
    else:
        project.configure(FORCED)
    project.write(text)

    result = project.run("-s")

    assert "returned [5, 6]" in text_of(result)
    assert FED in text_of(result)
    assert "first flipped: token 1 of request 0, 6 became 9" in text_of(result)


def test_nothing_is_fed_back_by_default(project):
    """Without the setting another token is a flip behind which nothing is judged."""
    project.write(TEST.format("(5, 9)"))

    result = project.run("-s")

    assert "returned [5, 9]" in text_of(result)
    assert FED not in text_of(result)


def test_an_update_records_the_own_tokens(project):
    """A golden that is written anew has what the engine samples."""
    project.configure(FORCED)
    project.write(TEST.format("(5, 9)"))

    result = project.run("-s", "--msprobe-update=all")

    assert result.ret == 0, text_of(result)
    assert "returned [5, 9]" in text_of(result)
    (golden,) = (project.folder / "golden").rglob("*.jsonl")
    assert "[5,9]" in golden.read_text()


def test_a_forced_capture_is_not_accepted(project, monkeypatch):
    """`accept` of a run whose tokens were fed says how to make the golden."""
    project.configure(FORCED)
    project.write(TEST.format("(5, 9)").replace("tokens=", "factor=2.0, tokens="))
    assert_failed(project.run(), failed=1)
    (run,) = sorted((project.folder / ".msprobe" / "runs").iterdir())[-1:]

    command = ["-m", "pytest_msprobe.cli.main", "accept", str(run)]
    result = project.pytester.run(sys.executable, *command)

    assert result.ret == 4
    assert "run the test with --msprobe-update" in text_of(result)


PAIR = """
def test_pair(msprobe):
    llm = LLM()
    a = msprobe.capture(llm)
    with a:
        llm.generate(tokens=(5, 6))
    with msprobe.capture(llm, "b", follow=a) as b:
        print("returned", llm.generate(tokens=(7, 6)))
    b.check(against=a)
"""


def test_tokens_of_another_capture_are_fed_back(project):
    """`follow` feeds back another capture's tokens, which must have ended."""
    project.write(PAIR)
    result = project.run("-s")
    project.write(
        PAIR.replace("    with a:\n        llm.generate(tokens=(5, 6))\n", "")
    )
    early = project.run()

    assert "returned [5, 6]" in text_of(result)
    assert FED in text_of(result)
    assert_failed(early, "record the capture that is followed first", failed=1)
