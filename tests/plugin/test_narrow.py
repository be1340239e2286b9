# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe narrow`: a test again on a good and a bad side."""

import subprocess
import sys

import pytest
from plugin_project import PluginProject

TEST = """
import kernel

def test_a(msprobe_engine):
    msprobe_engine.generate(factor=kernel.factor())
"""
RIGHT = "def factor():\n    return 1.0\n"
WRONG = "def factor():\n    return 1.25\n"  # longer, so that no stale bytecode is taken
GIT = ("-c", "user.name=a", "-c", "user.email=a@b.c")


def git(*arguments):
    """Runs git and returns what it printed."""
    command = ["git", *GIT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(params=["", "src", "tests"])
def project(request, pytester, monkeypatch):
    """A repository whose committed kernel is right and whose present one is wrong.

    The kernel lies beside the test, or in `src`, or the test in a folder of its own.
    """
    project = PluginProject(pytester, monkeypatch)
    where = "" if request.param == "tests" else request.param
    project.kernel = project.folder / where / "kernel.py"
    project.kernel.parent.mkdir(exist_ok=True)
    project.kernel.write_text(RIGHT)
    project.node = "test_project.py::test_a"
    if request.param == "tests":
        project.write(TEST, "tests/test_project.py")
        project.node = f"tests/{project.node}"
    else:
        project.write(TEST)
    folder = project.kernel.parent.relative_to(project.folder)
    (project.folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {folder}\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "right")
    project.kernel.write_text(WRONG)
    return project


def narrow(project, *arguments):
    """Runs the command; returns its exit code and all that it printed."""
    options = ["--msprobe-config", "msprobe.yaml"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest_msprobe.cli.main", "narrow"),
            *(project.node, *arguments, *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=project.folder,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_git_ref(project):
    """The working tree is held against a commit whose modules are taken first."""
    code, text = narrow(project, "--good", "HEAD")

    assert code == 1, text
    assert "good: HEAD (" in text
    assert "layer: first to compute something else (max 0.25" in text
    assert len(git("worktree", "list").splitlines()) == 1

    project.kernel.write_text(RIGHT)
    code, text = narrow(project, "--good", "HEAD")

    assert code == 0, text


@pytest.mark.parametrize("project", [""], indirect=True)
def test_interpreter_and_saved_run(project):
    """Another interpreter runs the same tree; a saved run is not run again."""
    project.kernel.write_text(RIGHT)
    project.run("--msprobe-update=new")
    (run,) = (project.folder / ".msprobe" / "runs").iterdir()
    code, text = narrow(project, "--good", sys.executable)
    assert code == 0, text
    project.kernel.write_text(WRONG)

    code, text = narrow(project, "--good", str(run))

    assert code == 1, text
    assert "layer: first to compute something else (max 0.25" in text


@pytest.mark.parametrize("project", [""], indirect=True)
@pytest.mark.parametrize(
    ("good", "phrase"),
    [
        ("no-such-ref", "no git ref, interpreter, capture or run folder"),
        (".git", "expected the captures of one test, found none"),
    ],
)
def test_unknown_good_side(project, good, phrase):
    """What is neither of the three is wrong use, in one line."""
    code, text = narrow(project, "--good", good)

    assert code == 4
    assert phrase in text


@pytest.mark.parametrize("project", [""], indirect=True)
def test_side_that_records_nothing(project):
    """A side whose test fails before it records is shown with its last lines."""
    project.kernel.write_text("raise ValueError('broken kernel')\n")

    code, text = narrow(project, "--good", "HEAD")

    assert code == 4
    assert "the working tree: the test recorded nothing" in text
    assert "broken kernel" in text
