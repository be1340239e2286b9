# SPDX-License-Identifier: Apache-2.0
"""What is recorded and judged: no test that asks for a fixture passes unjudged."""

import ctypes
import os
import subprocess
import sys

import pytest
from plugin_project import PluginProject, assert_failed, text_of

from pytest_msprobe.dump.capture import read_capture


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose tests are to be written."""
    return PluginProject(pytester, monkeypatch)


def with_fault(text):
    """The same test of a model that gives something else."""
    assert "generate()" in text
    return text.replace("generate()", "generate(factor=1.5)")


# Tests of one capture, by what is special about them.
JUDGED = {
    "engine": """
def test_a(msprobe_engine):
    msprobe_engine.generate()
""",
    "engine_late": """
def test_a(request):
    request.getfixturevalue("msprobe_engine").generate()
""",
    "both_late": """
def test_a(request):
    msprobe = request.getfixturevalue("msprobe")
    with msprobe.capture(request.getfixturevalue("msprobe_engine")) as capture:
        capture.llm.generate()
""",
    "own_engine": """
def test_a(request):
    llm = LLM()
    with request.getfixturevalue("msprobe").capture(llm):
        llm.generate()
""",
    "no_capture": """
def test_a(msprobe_engine, msprobe):
    msprobe_engine.generate()
""",
    "only_a_check": """
def test_a(msprobe_engine, msprobe):
    msprobe_engine.generate()
    msprobe.check()
""",
    "autouse": """
@pytest.fixture(autouse=True)
def helper(msprobe):
    return msprobe

def test_a(msprobe_engine):
    msprobe_engine.generate()
""",
    "around_the_test": """
@pytest.fixture
def recorded(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        yield msprobe_engine
    msprobe.check()

def test_a(recorded):
    recorded.generate()
""",
    "two_engines": """
def test_a(msprobe_engine, msprobe):
    msprobe_engine.generate(layer="not judged")
    llm = LLM()
    with msprobe.capture(llm):
        llm.generate()
""",
    "engine_after_a_capture": """
def test_a(request, msprobe):
    llm = LLM()
    with msprobe.capture(llm):
        llm.generate()
    request.getfixturevalue("msprobe_engine").generate(layer="not judged")
""",
}


def write_all(project, tests):
    """One test file for each entry."""
    for name, text in tests.items():
        project.write(text, f"test_{name}.py")


def test_however_a_fixture_is_asked_for_the_test_is_judged(project):
    """Without a golden it fails; with one it passes, and fails with a fault."""
    count = len(JUDGED)
    write_all(project, JUDGED)
    assert_failed(project.run(), failed=count)
    project.record()
    assert [path.split("/")[0] for path in project.goldens()] == sorted(
        f"test_{name}.py" for name in JUDGED
    )
    passed = project.run()
    assert passed.ret == 0, text_of(passed)
    assert text_of(passed).count(": pass: 2 rows judged") == count

    write_all(project, {name: with_fault(text) for name, text in JUDGED.items()})

    result = project.run()
    assert_failed(result, failed=count)
    for name in JUDGED:
        line = f"FAILED test_{name}.py::test_a - layer: first to compute something"
        assert line in text_of(result)


NOTHING = {
    "named": "def test_a(msprobe):\n    pass\n",
    "late": "def test_a(request):\n    request.getfixturevalue('msprobe')\n",
    "autouse": """
@pytest.fixture(autouse=True)
def helper(msprobe):
    return msprobe

def test_a():
    pass
""",
    "usefixtures": "@pytest.mark.usefixtures('msprobe')\ndef test_a():\n    pass\n",
}


def test_asking_for_msprobe_and_capturing_nothing_fails(project):
    """A test that asked for msprobe in any way and recorded nothing does not pass."""
    write_all(project, NOTHING)

    result = project.run()

    assert_failed(result, failed=len(NOTHING))
    result.stdout.fnmatch_lines_random(
        f"FAILED test_{name}.py::test_a - *asks for msprobe and captured nothing; *"
        for name in NOTHING
    )


def test_an_engine_that_computed_nothing_fails(project):
    """A test that asked for the engine and did not use it does not pass."""
    project.write("def test_a(msprobe_engine):\n    pass\n")

    assert_failed(project.run(), "recorded no row in 0 steps", failed=1)


def test_a_capture_that_was_never_entered_fails(project):
    """Making a capture without entering it is no recording."""
    project.write(
        "def test_a(msprobe_engine, msprobe):\n"
        "    msprobe_engine.generate()\n    msprobe.capture(msprobe_engine)\n"
    )

    assert_failed(project.run(), "the capture has no files to judge", failed=1)


def test_a_capture_discards_the_automatic_recording(project):
    """Only what a test captured itself is in its golden, dump and verdict."""
    project.write(
        """
def test_a(msprobe_engine, msprobe):
    for _ in range(3):
        msprobe_engine.generate(layer="warmup")
    with msprobe.capture(msprobe_engine) as first:
        assert not first.folder.exists() or not list(first.folder.iterdir())
        msprobe_engine.generate()
    with msprobe.capture(msprobe_engine):
        msprobe_engine.generate(layer="other")
    assert first.name == ""
"""
    )

    project.record()

    names = {path.split("/")[1] for path in project.goldens()}
    assert names == {"test_a", "test_a@capture2"}
    calls = {
        path.parent.name: [call.c for _, call in read_capture(path).calls()]
        for path in (project.folder / "golden").rglob("*.jsonl")
    }
    assert calls == {
        "test_a": ["Module.layer.M.forward.0"],
        "test_a@capture2": ["Module.other.M.forward.0"],
    }


UNFINISHED = """
@pytest.fixture
def skipping(msprobe_engine):
    pytest.skip("not here")

@pytest.fixture
def failing(msprobe_engine):
    raise RuntimeError("a fixture of the user's")

def test_skipped(msprobe_engine, skipping):
    msprobe_engine.generate()

def test_error(msprobe_engine, failing):
    msprobe_engine.generate()

def test_own_failure(msprobe_engine):
    msprobe_engine.generate()
    assert 1 == 2

def test_skips_itself(msprobe_engine):
    pytest.skip("later")

def test_late(request):
    request.getfixturevalue("msprobe_engine")
    raise KeyError("the test's own")

def test_good(msprobe_engine):
    msprobe_engine.generate()
"""


def test_an_unfinished_test_leaves_no_recording_open(project):
    """After skips and errors in set-up or in the test the next one is recorded."""
    project.write(UNFINISHED)

    result = project.run("--msprobe-update=new")

    result.assert_outcomes(passed=1, failed=2, errors=1, skipped=2)
    assert "already running" not in text_of(result)
    assert [path.split("/")[1] for path in project.goldens()] == ["test_good"]
    assert 'KeyError: "the test\'s own"' in text_of(result)


@pytest.mark.parametrize("way", ["msprobe_engine", "request"])
def test_an_engine_that_cannot_start_is_told_once(project, way):
    """The reason stands in one line of the error and one of the summary."""
    project.configure("engine: {model: any, broken: out of luck}\n")
    project.write(
        f"def test_a({way}):\n    request.getfixturevalue('msprobe_engine')\n"
    )

    result = project.run()

    outcome = {"errors": 1} if way == "msprobe_engine" else {"failed": 1}
    assert_failed(result, **outcome)
    lines = [x for x in text_of(result).splitlines() if "out of luck" in x]
    assert len(lines) == 2, lines
    assert lines[0].startswith("vLLM ")
    assert lines[1].startswith(("ERROR test_project", "FAILED test_project"))


def test_a_fixture_asked_for_late_without_configuration_fails(project):
    """Without configuration the test fails in one line that says what to add."""
    project.write("def test_a(request):\n    request.getfixturevalue('msprobe')\n")

    result = project.run(config=None)

    assert_failed(result, failed=1)
    result.stdout.fnmatch_lines(["FAILED *no configuration; add --msprobe-config*"])


def test_a_capture_after_the_test_is_refused(project):
    """What a fixture records in its teardown would never be judged: an error."""
    project.write(
        """
@pytest.fixture
def late(msprobe, msprobe_engine):
    yield
    with msprobe.capture(msprobe_engine, name="late"):
        msprobe_engine.generate()

def test_a(msprobe_engine, late):
    msprobe_engine.generate()
"""
    )

    result = project.run("--msprobe-update=new")

    assert_failed(result, "capture after the test has been judged", passed=1, errors=1)


@pytest.mark.skipif(
    int(pytest.__version__.partition(".")[0]) < 9, reason="subtests came with pytest 9"
)
def test_subtests_do_not_end_a_recording(project):
    """What a test computes after its first subtest is judged as well."""
    text = """
def test_a(msprobe_engine, subtests):
    with subtests.test("first"):
        msprobe_engine.generate(layer="before")
    msprobe_engine.generate()
"""
    project.write(text)
    project.record()

    project.write(with_fault(text))

    result = project.run()
    assert result.ret == 1
    assert "layer: first to compute something else" in text_of(result)


def test_a_dump_path_that_cannot_be_made_is_one_line(project):
    """Where no dump can be written the test fails with the path and no traceback."""
    (project.folder / "taken").write_text("")
    project.configure("engine: {model: any}\ncapture: {dump_path: taken/runs}\n")
    project.write(
        """
def test_automatic(msprobe_engine):
    msprobe_engine.generate()

def test_explicit(msprobe):
    with msprobe.capture(LLM()) as capture:
        capture.llm.generate()
"""
    )

    result = project.run()

    assert_failed(result, errors=1, failed=1)
    lines = [x for x in text_of(result).splitlines() if "taken/runs" in x]
    summary = [x for x in lines if x.startswith(("ERROR ", "FAILED "))]
    assert len(summary) == 2
    assert all("cannot be written" in line for line in lines), lines


def test_a_verdict_that_cannot_be_written_is_one_line(project):
    """An error of the file system after the test is a failure with the path."""
    project.write(
        """
def test_a(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine) as capture:
        msprobe_engine.generate()
        (capture.folder / "verdict.json").mkdir(parents=True)
"""
    )

    result = project.run("--msprobe-update=new")

    assert_failed(result, "verdict.json: cannot be written", failed=1)
    assert project.goldens() == []


def test_a_warning_of_a_running_capture_is_printed_at_once(project):
    """What is warned of while a test runs does not wait for the test's end."""
    project.write(
        """
import logging
import os

def test_a():
    logging.getLogger("pytest_msprobe").info("no %s", "news")
    logging.getLogger("pytest_msprobe").warning("too many %s", "bytes")
    print("captured")
    os._exit(7)
"""
    )

    result = project.run()

    text = text_of(result)
    assert result.ret == 7
    assert "too many bytes" in text.splitlines()
    assert "no news" not in text
    assert "captured" not in text


ASYNCHRONOUS = """
import asyncio

class AsyncLLM(LLM):
    async def collective_rpc(self, *args, **kwargs):
        return super().collective_rpc(*args, **kwargs)

def test_a(msprobe):
    async def main():
        llm = AsyncLLM()
        async with msprobe.capture(llm) as capture:
            llm.generate()
        capture.check()
    asyncio.run(main())
"""


def test_an_asynchronous_engine_is_judged(project):
    """`async with` records an AsyncLLM; its golden passes and catches a fault."""
    project.write(ASYNCHRONOUS)
    project.record()
    assert project.run().ret == 0

    project.write(with_fault(ASYNCHRONOUS))
    result = project.run()
    assert_failed(result, "layer: first to compute something else", failed=1)

    project.write(ASYNCHRONOUS.replace("async with", "with"))
    result = project.run()
    assert_failed(result, "write: async with msprobe.capture(engine)", failed=1)


def without_privileges():
    """Lets a program of root be refused as anybody else is."""
    drop_from_bounding_set = 24
    for override in (1, 2):  # of permissions to write, and to read and search
        ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_read_only_dump_path_is_one_line(project):
    """Where the folder is not writable the test says so; the next one is not hurt."""
    folder = project.folder / "runs"
    folder.mkdir(mode=0o555)
    project.configure("engine: {model: any}\ncapture: {dump_path: runs}\n")
    project.write("def test_a(msprobe_engine):\n    msprobe_engine.generate()\n")

    command = [sys.executable, "-m", "pytest", "--msprobe-config", "msprobe.yaml"]
    done = subprocess.run(
        [*command, "--msprobe-update=new"],
        cwd=project.folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=without_privileges if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("ERROR "))
    assert "cannot be written (Permission denied); make it writable, or" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert list(folder.iterdir()) == project.goldens() == []
