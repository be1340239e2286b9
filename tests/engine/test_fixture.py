# SPDX-License-Identifier: Apache-2.0
"""The fixtures, goldens and messages with a real engine, through pytest itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tools

VARIABLES = {k: v for k, v in tools.ENVIRONMENT.items() if k != "MSPROBE_ATTACH"}
CONFIG = f"""
engine:
  model: {tools.MODEL}
  dtype: bfloat16
  max_model_len: 128
  env: {json.dumps(VARIABLES)}
"""
HEAD = """
import os
import pytest
from vllm import SamplingParams

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

def run(llm, *prompts):
    prompts = list(prompts) or ["the others only inherit it"]
    llm.generate(prompts, GREEDY, use_tqdm=False)
"""
GOOD = """
def test_explicit(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)
    msprobe.check()

def test_automatic(msprobe_engine):
    run(msprobe_engine)

def test_unchecked(msprobe_engine, msprobe):
    run(msprobe_engine, "what comes before a capture is not judged")
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)

@pytest.mark.msprobe(level="mix", decode_steps=1)
def test_mix(msprobe_engine):
    run(msprobe_engine)

def test_two_captures(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine) as first:
        run(msprobe_engine)
    with msprobe.capture(msprobe_engine, name="second"):
        run(msprobe_engine, "explain gravity in one sentence")
    first.check()

class TestGroup:
    @pytest.mark.parametrize("word", ["a/b", "c"])
    def test_names(self, msprobe_engine, word):
        run(msprobe_engine, word + " is the first")
"""


class Project:
    """A user's project in a folder, run in processes of its own."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "msprobe.yaml").write_text(CONFIG)

    def write(self, body, name="test_project.py"):
        """Writes a test file."""
        (self.folder / name).write_text(HEAD + body)

    def run(self, *arguments, command=None, **environment):
        """Runs pytest; returns the finished process."""
        options = ["--msprobe-config", "msprobe.yaml", "-p", "no:cacheprovider"]
        start = command or [sys.executable, "-m", "pytest"]
        return subprocess.run(
            [*start, *options, *arguments],
            cwd=self.folder,
            env=tools.clean_environment(**environment),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def goldens(self):
        """The golden tree: contents by path."""
        root = self.folder / "golden"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*.jsonl"))
        }


@pytest.fixture(scope="module")
def project(demo_model, tmp_path_factory):
    """A project whose goldens have been written once."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.write(GOOD)
    missing = project.run()
    written = project.run("--msprobe-update=new")
    project.missing, project.written = missing, written
    return project


def test_missing_goldens_fail_with_the_command(project):
    """Without goldens every test fails, printing the exact command that writes it."""
    text = project.missing.stdout

    assert project.missing.returncode == 1
    assert "Traceback" not in text
    assert "7 failed" in text
    assert (
        "pytest --msprobe-config msprobe.yaml --msprobe-update=new "
        "test_project.py::test_explicit" in text
    )
    assert "FAILED test_project.py::test_explicit - no golden for" in text


def test_update_writes_one_golden_a_capture(project):
    """--msprobe-update=new writes the golden tree beside the configuration."""
    assert project.written.returncode == 0, project.written.stdout
    folders = {path.rpartition("/")[0] for path in project.goldens()}

    assert folders >= {
        "test_project.py/test_explicit",
        "test_project.py/test_two_captures",
        "test_project.py/test_two_captures@second",
        "test_project.py/TestGroup.test_names[c]",
    }
    assert len(folders) == 8
    assert project.written.stdout.count("golden written:") == 8


def test_second_run_is_green_and_leaves_a_run(project):
    """The same tests pass bit for bit; dump, capture and verdict are left behind."""
    before = project.goldens()

    done = project.run()

    assert done.returncode == 0, done.stdout
    assert project.goldens() == before
    line = next(x for x in done.stdout.splitlines() if x.startswith("run: "))
    run = project.folder / line.removeprefix("run: ")
    place = run / "test_project.py" / "test_explicit"
    verdict = json.loads((place / "verdict.json").read_text())
    assert verdict["status"] == "pass"
    assert verdict["equal"] == verdict["judged"] > 500
    assert (place / "step2" / "rank0" / "dump.json").is_file()
    assert not (place / "step3").exists()
    mix = run / "test_project.py" / "test_mix"
    assert (
        "Vllm.unified_attention_with_output.0.forward"
        in json.loads((mix / "step0" / "rank0" / "dump.json").read_text())["data"]
    )
    assert not (mix / "step2").exists()


def test_a_capture_discards_what_was_recorded_before(project):
    """Of a test that captures only its captures are in the golden."""
    folders = [
        project.folder / "golden" / "test_project.py" / name
        for name in ("test_explicit", "test_unchecked")
    ]

    explicit, unchecked = (
        json.loads(next(folder.glob("*.jsonl")).read_text().splitlines()[0])
        for folder in folders
    )

    assert len(unchecked["requests"]) == 1
    assert unchecked["requests"] == explicit["requests"]


BROKEN = """
@pytest.fixture
def fault(msprobe_engine):
    model = msprobe_engine.llm_engine.model_executor.driver_worker.model_runner.model
    impl = model.model.layers[1].self_attn.attn.impl
    impl.scale *= 1.01
    yield
    impl.scale /= 1.01

def test_explicit(msprobe_engine, msprobe, fault):
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)
    msprobe.check()

def test_automatic(msprobe_engine):
    run(msprobe_engine)
    assert 1 == 2, "the test's own"

def test_unchecked(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        pass

def test_mix(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)

def test_error_inside(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)
        raise KeyError("inside the block")

def test_two_captures(msprobe_engine, msprobe, fault):
    with msprobe.capture(msprobe_engine):
        run(msprobe_engine)
    with msprobe.capture(msprobe_engine, name="second"):
        run(msprobe_engine, "explain gravity in two sentences")

def test_after_all_that(msprobe_engine):
    run(msprobe_engine)
"""


def test_failures_of_every_kind(project, tmp_path):
    """Each failing test says what happened, and none disturbs the next one."""
    other = Project(tmp_path)
    other.write(BROKEN)
    shutil.copytree(project.folder / "golden", tmp_path / "golden")
    before = other.goldens()

    done = other.run("--msprobe-update=new", "-vv")

    text = done.stdout
    assert done.returncode == 1
    assert "Traceback" not in text
    assert "6 failed, 1 passed" in text
    guilty = "model.layers.1.self_attn.attn: first to compute something else"
    assert f"FAILED test_project.py::test_explicit - {guilty}" in text
    assert "the test's own" in text
    assert "recorded no row in 0 steps" in text
    assert "cannot be compared with the golden" in text
    assert "KeyError: 'inside the block'" in text
    # Only the new test that passed has a new golden; failing ones wrote nothing.
    after = other.goldens()
    new = set(after) - set(before)
    assert {path.split("/")[1] for path in new} == {"test_after_all_that"}
    assert all(after[path] == before[path] for path in before)


def test_update_command_writes_and_says_what_moved(project, tmp_path):
    """`pytest-msprobe update` accepts a change and prints by how much rows moved."""
    other = Project(tmp_path)
    other.write(BROKEN.split("def test_automatic", maxsplit=1)[0])
    shutil.copytree(project.folder / "golden", tmp_path / "golden")
    command = [sys.executable, "-m", "pytest_msprobe.cli.main", "update"]

    done = other.run(command=command)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "what moved:" in done.stdout
    assert "beyond their limits; model.layers.1.self_attn.attn" in done.stdout
    changed = [k for k, v in other.goldens().items() if v != project.goldens()[k]]
    assert [path.split("/")[1] for path in changed] == ["test_explicit"]


def test_gate_reports_and_never_writes(project):
    """`pytest-msprobe gate` is read-only and leaves HTML, JUnit and a summary."""
    before = project.goldens()
    summary = project.folder / "summary.md"
    command = [sys.executable, "-m", "pytest_msprobe.cli.main", "gate"]

    done = project.run(
        "-k", "explicit", command=command, GITHUB_STEP_SUMMARY=str(summary)
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert project.goldens() == before
    report = project.folder / "msprobe-report"
    assert "0 of 1 red" in (report / "report.html").read_text()
    assert "testcase" in (report / "junit.xml").read_text()
    assert "test_explicit" in summary.read_text()


TWO_ENGINES = """
import psutil

def shared_memory():
    return {name for name in os.listdir("/dev/shm")}

BEFORE = shared_memory()
SEEN = []

def note(llm):
    children = psutil.Process().children(recursive=True)
    SEEN.append((id(llm), len(children)))

@pytest.mark.msprobe(engine={"max_model_len": 64})
def test_a(msprobe_engine):
    note(msprobe_engine)
    run(msprobe_engine)

def test_b(msprobe_engine):
    note(msprobe_engine)
    run(msprobe_engine)

@pytest.mark.msprobe(engine={"max_model_len": 64})
def test_c(msprobe_engine):
    note(msprobe_engine)
    run(msprobe_engine)

def test_engines():
    assert len({engine for engine, _ in SEEN}) == 2
    assert SEEN[0][0] == SEEN[1][0]
    assert max(children for _, children in SEEN) == 0
    assert shared_memory() <= BEFORE
"""


def shared_memory():
    """Names of the shared memory segments of this machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}  # noqa: S108 - its place


def engine_processes():
    """Numbers of all processes of vLLM's engines on this machine."""
    return {
        process.pid
        for process in psutil.process_iter(["name"])
        if "VLLM" in process.info["name"] or "EngineCore" in process.info["name"]
    }


def test_one_engine_a_configuration_one_live_at_a_time(project, tmp_path):
    """Tests are sorted by engine, each engine starts once and leaves nothing behind."""
    other = Project(tmp_path)
    other.write(TWO_ENGINES)
    before, running = shared_memory(), engine_processes()

    done = other.run("--msprobe-update=new", "-v")

    assert done.returncode == 0, done.stdout
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    order = [line.split("::")[1].split()[0] for line in passed]
    assert order == ["test_a", "test_c", "test_b", "test_engines"]
    assert shared_memory() <= before
    assert engine_processes() <= running


def test_msprobes_config_json_works_unchanged(project, tmp_path):
    """An msProbe config.json drives a test with an engine of the user's."""
    other = Project(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**tools.GUIDE, "dump_path": str(tmp_path / "dumps"), "level": "mix"}
        )
    )
    other.write(
        f"""
@pytest.fixture(scope="module")
def my_llm():
    from vllm import LLM
    return LLM(model={str(tools.MODEL)!r}, enforce_eager=True, max_model_len=128,
               enable_prefix_caching=False)

def test_mine(my_llm, msprobe):
    with msprobe.capture(my_llm):
        run(my_llm)
    msprobe.check()
"""
    )
    options = ["--msprobe-config", "config.json", "-p", "no:cacheprovider"]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *options]
    results = [
        subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env=tools.clean_environment(**tools.ENVIRONMENT),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        for more in (["--msprobe-update"], [])
    ]

    assert [done.returncode for done in results] == [0, 0], results[-1].stdout
    dumps = list((tmp_path / "dumps").rglob("dump.json"))
    assert len(dumps) == 6
    assert json.loads(dumps[0].read_text())["level"] == "mix"
