# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe calibrate`: noise of clean runs in the goldens."""

import sys

import pytest
from plugin_project import PluginProject, text_of

from pytest_msprobe.dump.capture import read_capture

TEST = """
def test_a(msprobe_engine):
    msprobe_engine.generate(factor=FACTOR)
"""
NOISY = "engine: {model: any, jitter: 0.002}\n"


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with a golden, of an engine whose batches are off by 0.2 %."""
    project = PluginProject(pytester, monkeypatch)
    project.configure(NOISY)
    project.write(TEST.replace("FACTOR", "1.0"))
    project.record()
    return project


def calibrate(project, *arguments):
    """Runs the command."""
    command = [sys.executable, "-m", "pytest_msprobe.cli.main", "calibrate"]
    return project.pytester.run(
        *command, *arguments, "--msprobe-config", "msprobe.yaml"
    )


def golden_of(project):
    """The golden."""
    (name,) = project.goldens()
    return read_capture(project.folder / "golden" / name)


def test_noise_is_stored_listed_and_raises_limits(project):
    """A difference four times the noise passes then; one beyond it still fails."""
    project.write(TEST.replace("FACTOR", "1.006"))
    assert project.run().ret == 1
    project.write(TEST.replace("FACTOR", "1.0"))

    result = calibrate(project, "--runs=repeat,batch,chunks,order")

    text = text_of(result)
    assert result.ret == 0, text
    assert "4 runs: repeat, batch, chunks of 2 tokens, order" in text
    assert "1 of 2 tensors have noise" in text
    assert "noise above the rule in 1 rows:" in text
    assert "Module.layer.M.forward.0.output.0@0.prompt: rel_l2 0.002" in text
    golden = golden_of(project)
    assert golden.header.noise["runs"][1] == "batch"
    noise = [line.n for line in golden.tensors.values() if line.n]
    assert len(noise) == 1
    assert noise[0][1] == pytest.approx(0.002, rel=0.06)

    project.write(TEST.replace("FACTOR", "1.006"))
    passing = project.run()
    assert passing.ret == 0, text_of(passing)
    assert "1 rows have their limits from the noise" in text_of(passing)
    project.write(TEST.replace("FACTOR", "1.01"))
    failing = project.run()
    assert failing.ret == 1
    assert "noise/limit" in text_of(failing)


def test_an_update_forgets_noise_and_says_so(project):
    """A golden that is written anew has to be calibrated again."""
    assert calibrate(project, "--runs=batch").ret == 0
    project.write(TEST.replace("FACTOR", "1.5"))

    result = project.run("--msprobe-update=failing")

    assert result.ret == 0
    assert "run pytest-msprobe calibrate again" in text_of(result)
    assert not golden_of(project).header.noise


def test_red_tests_are_not_calibrated(project):
    """What does not pass as it is gets no noise: it would hide the regression."""
    project.write(TEST.replace("FACTOR", "1.5"))

    result = calibrate(project, "--runs=batch")

    assert result.ret == 1
    assert "the tests must pass first" in text_of(result)
    assert not golden_of(project).header.noise


@pytest.mark.parametrize(
    ("arguments", "variables", "phrase"),
    [
        (["--runs=nothing"], {}, "known: repeat, threads"),
        (["--msprobe-update=all"], {}, "write the goldens first"),
        ([], {"CI": "true"}, "not written where CI is set"),
    ],
)
def test_wrong_use(project, monkeypatch, arguments, variables, phrase):
    """Unknown runs, an update at once and CI are exit code 4, before any run."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    result = calibrate(project, *arguments)

    assert result.ret == 4
    assert phrase in text_of(result)
    assert "test session starts" not in text_of(result)


def test_a_run_that_calibrates_fails_nothing_and_is_refused_in_ci(project, monkeypatch):
    """It says so in its first lines; where CI is set it is refused."""
    change = '{"engine": {}, "env": {}, "reverse": false}'
    monkeypatch.setenv("MSPROBE_CALIBRATION", change)
    project.write(TEST.replace("FACTOR", "1.5"))

    result = project.run()
    assert result.ret == 0
    assert "calibrating: no verdict fails" in text_of(result)

    monkeypatch.setenv("CI", "true")
    assert project.run().ret == 4
