# SPDX-License-Identifier: Apache-2.0
"""The commands review, accept, prune, report and init."""

import sys

import pytest
from plugin_project import PluginProject, text_of

TEST = """
def test_a(msprobe_engine):
    msprobe_engine.generate(factor=1.0)

def test_b(msprobe_engine):
    msprobe_engine.generate()
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with the goldens of two tests, of which one fails now."""
    project = PluginProject(pytester, monkeypatch)
    project.write(TEST)
    project.record()
    project.write(TEST.replace("1.0", "1.5"))
    assert project.run().ret == 1
    return project


def command(project, *arguments):
    """Runs pytest-msprobe."""
    program = [sys.executable, "-m", "pytest_msprobe.cli.main"]
    return project.pytester.run(*program, *arguments)


def last_run(project):
    """The folder of the last run."""
    return max((project.folder / ".msprobe" / "runs").iterdir())


def test_a_run_is_reviewed_and_accepted(project):
    """Review shows what moved and where; accept makes it the golden."""
    run = last_run(project)

    seen = command(project, "review", run)
    assert seen.ret == 1
    assert "test_project.py::test_a: 1 of 2 rows, 1 beyond their limits" in text_of(
        seen
    )
    assert "test_b" not in text_of(seen)

    accepted = command(project, "accept", run)
    assert accepted.ret == 0, text_of(accepted)
    assert text_of(accepted).count("golden written") == 1
    assert project.run().ret == 0


def test_new_tests_are_accepted_and_others_left_alone(project):
    """A missing golden is written; --test chooses."""
    project.write(TEST.replace("1.0", "1.5").replace("test_b", "test_c"))
    project.run()

    accepted = command(project, "accept", last_run(project), "--test", "test_c")

    assert "test_c/cpu-avx2-amd.jsonl" in text_of(accepted)
    assert project.run().ret == 1
    assert len(project.goldens()) == 3


def test_ranks_that_disagree_are_not_accepted(project):
    """No golden comes from ranks that hold other copies."""
    project.configure("engine: {model: any, ranks: 2, drift: 0.5}\n")
    project.run()

    accepted = command(project, "accept", last_run(project))

    assert accepted.ret == 4
    assert "ranks 0 and 1 disagree" in text_of(accepted)


@pytest.mark.parametrize("arguments", [["accept", "RUN"], ["prune", "--yes"]])
def test_ci_changes_no_goldens(project, monkeypatch, arguments):
    """Where CI is set, goldens stay as they are: exit code 4."""
    before = project.goldens()
    monkeypatch.setenv("CI", "true")
    arguments = [str(last_run(project)) if a == "RUN" else a for a in arguments]

    result = command(project, *arguments)

    assert result.ret == 4
    assert "where CI is set" in text_of(result)
    assert project.goldens() == before


def test_goldens_of_tests_that_are_gone_are_pruned(project):
    """They are listed first, and removed when told to; others stay."""
    project.write(TEST.partition("def test_b")[0])

    listed = command(project, "prune")
    assert listed.ret == 1
    assert "test_b/cpu-avx2-amd.jsonl (test_project.py::test_b)" in text_of(listed)
    assert len(project.goldens()) == 2

    assert command(project, "prune", "--yes").ret == 0
    assert project.goldens() == ["test_project.py/test_a/cpu-avx2-amd.jsonl"]
    assert "every golden is of a test" in text_of(command(project, "prune"))


def test_prune_removes_nothing_where_tests_cannot_be_collected(project):
    """A test file that does not import is no reason to take its goldens for orphans."""
    project.write("import nothing_of_this_name\n")

    result = command(project, "prune", "--yes")

    assert result.ret == 4
    assert "cannot be collected" in text_of(result)
    assert len(project.goldens()) == 2


def test_a_saved_run_is_reported(project):
    """The page of a run lies in it."""
    result = command(project, "report", last_run(project))

    assert result.ret == 1
    assert "2 verdicts, 1 red" in text_of(result)
    assert "test_a" in (last_run(project) / "report.html").read_text()


def test_init_writes_what_works_and_overwrites_nothing(pytester, monkeypatch):
    """The files are a project that runs; a second time is exit code 4."""
    project = PluginProject(pytester, monkeypatch)
    (project.folder / "msprobe.yaml").unlink()

    assert command(project, "init", "--model", "any").ret == 0
    assert "model: any" in (project.folder / "msprobe.yaml").read_text()
    compile((project.folder / "tests" / "test_precision.py").read_text(), "t", "exec")
    assert command(project, "init", "--model", "any").ret == 4
