# SPDX-License-Identifier: Apache-2.0
"""Engines and tests that fail in the middle: what is left, and what is said."""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tools

from pytest_msprobe.dump.layout import ranks_of, steps_of

pytest_plugins = ["pytester"]

CONFIG = """
capture:
  level: L0
engine:
  model: {model}
  dtype: bfloat16
  max_model_len: 128
  {more}
"""

HEAD = '''
import os, resource, signal, threading, time
from pathlib import Path
import psutil, pytest
from vllm import SamplingParams

PROMPT = "the first layer to differ is the one to look at"


def generate(llm, tokens=3):
    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    (answer,) = llm.generate([PROMPT], parameters, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


def healthy(llm, msprobe):
    with msprobe.capture(llm):
        tokens = generate(llm)
    assert tokens == {tokens}


def layer(llm):
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return runner.get_model().model.layers[2].mlp


def during_step(module, number, action):
    """Calls an action inside the forward of a module, in one step."""
    original, count = module.forward, [0]

    def forward(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            action()
        return original(*args, **kwargs)

    module.forward = forward


def act_later(folder, action):
    """Acts once some steps are there."""
    def run():
        while not (folder / "step5").exists():
            time.sleep(0.01)
        action()
    threading.Thread(target=run).start()


def kill_later(title, folder):
    """Kills the process of this title once some steps are there."""
    def kill():
        for child in psutil.Process().children(recursive=True):
            if title in " ".join(child.cmdline()):
                child.kill()
    act_later(folder, kill)
'''

IN_PROCESS = """
def test_exception(msprobe_engine, msprobe):
    def fail():
        raise ValueError("planted in a layer")

    with msprobe.capture(msprobe_engine):
        during_step(layer(msprobe_engine), 3, fail)
        generate(msprobe_engine, 8)


def test_after_exception(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)


def test_timeout(msprobe_engine, msprobe):
    def alarm(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, alarm)
    with msprobe.capture(msprobe_engine):
        during_step(
            layer(msprobe_engine), 4, lambda: signal.setitimer(signal.ITIMER_REAL, 1e-4)
        )
        generate(msprobe_engine, 90)


def test_after_timeout(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)


def test_left_open(msprobe_engine, msprobe):
    msprobe.capture(msprobe_engine).__enter__()
    assert generate(msprobe_engine) == {tokens}


def test_after_left_open(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)


def test_full_disk(msprobe_engine, msprobe):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    capture = msprobe.capture(msprobe_engine)
    try:
        with capture:
            generate(msprobe_engine)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_after_full_disk(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)


def test_unwritable(msprobe_engine, msprobe):
    capture = msprobe.capture(msprobe_engine)
    capture.folder.parent.mkdir(parents=True, exist_ok=True)
    capture.folder.write_text("a file stands where the folder should be")
    with capture:
        generate(msprobe_engine)


def test_after_unwritable(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)
"""


def left_memory(before):
    """Shared memory made since then that no process uses."""
    from pytest_msprobe.engine.launch import shared_memory

    found = shared_memory() - before
    for process in psutil.process_iter() if found else ():
        with contextlib.suppress(psutil.Error, OSError):
            found -= {Path(entry.path) for entry in process.memory_maps()}
    return found


def left_processes(folder):
    """Processes of engines that were started in a folder."""
    titles = ("VLLM::", "multiprocessing.spawn")
    return {
        process.pid
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(folder.resolve())
        if any(title in " ".join(process.info["cmdline"] or ()) for title in titles)
    }


@pytest.fixture(scope="module")
def tokens(engine):
    """The tokens that a healthy engine generates."""
    (answer,) = tools.generate(engine, [tools.PROMPT])
    return list(answer.outputs[0].token_ids)


def run(pytester, tokens, tests, *, more="seed: 0", is_group=False, **variables):
    """Runs a test file against real engines, of which nothing is left afterwards.

    Args:
        pytester: Where the file is written.
        tokens: What a healthy engine generates.
        tests: The tests.
        more: A line below `engine`.
        is_group: Whether it gets a process group of its own, as in a terminal.
        variables: Of the environment.
    """
    from pytest_msprobe.engine.launch import shared_memory

    (pytester.path / "msprobe.yaml").write_text(
        CONFIG.format(model=tools.MODEL, more=more)
    )
    (pytester.path / "test_it.py").write_text(
        (HEAD + tests).replace("{tokens}", str(tokens))
    )
    environment = tools.clean_environment(**{**tools.ENVIRONMENT, **variables})
    before = shared_memory()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA",
         "--msprobe-config", "msprobe.yaml", "--msprobe-update=new"],
        cwd=pytester.path,
        env={"COLUMNS": "250", **environment},
        capture_output=True,
        text=True,
        timeout=600,  # an engine that hangs; a busy machine is slow
        check=False,
        start_new_session=is_group,
    )  # fmt: skip
    deadline = time.monotonic() + 15
    while left_processes(pytester.path) or left_memory(before):
        assert time.monotonic() < deadline, "an engine left processes or shared memory"
        time.sleep(0.5)
    return done


def outcomes(done):
    """Outcome of each test."""
    line = re.compile(r"^(PASSED|FAILED|ERROR) test_it\.py::(\w+)", re.MULTILINE)
    found = line.findall(done.stdout)
    return {name: outcome for outcome, name in found}


def complete_steps(folder):
    """Numbers of the steps that are complete below a run's folder."""
    found = set()
    for step in folder.rglob("step*"):
        for rank in ranks_of(step).values():
            json.loads((rank / "dump.json").read_text())
            found.add(int(step.name[4:]))
    return found


def assert_half_written_are_no_steps(folder):
    """What a process wrote when it was ended makes no step, and no file, complete."""
    for path in folder.rglob("*.tmp"):
        assert path.parent.name.startswith("rank")
        assert not (path.parent / "dump.json").exists()


def capture_folder(pytester, test):
    """Folder of a test's capture."""
    (folder,) = (pytester.path / ".msprobe" / "runs").glob(f"*/test_it.py/{test}")
    return folder


def test_faults_of_an_engine_in_this_process(pytester, tokens):
    """Each fault fails its own test with a message, the next test's engine works."""
    done = run(pytester, tokens, IN_PROCESS)

    found = outcomes(done)
    assert {n: o for n, o in found.items() if n.startswith("test_after")} == {
        f"test_after_{name}": "PASSED"
        for name in ("exception", "timeout", "left_open", "full_disk", "unwritable")
    }, done.stdout[-6000:]
    assert found["test_left_open"] == "PASSED"
    for name in ("exception", "timeout", "full_disk", "unwritable"):
        assert found[f"test_{name}"] == "FAILED", name
    assert "ValueError: planted in a layer" in done.stdout
    assert "TimeoutError: the test took too long" in done.stdout
    assert "the dump could not be written: [Errno 27] File too large" in done.stdout
    assert re.search(r"test_unwritable: cannot be written \(\w+", done.stdout)
    # Of a step that was broken off nothing is left, what came before is complete.
    assert complete_steps(capture_folder(pytester, "test_exception")) == {0, 1}
    assert complete_steps(capture_folder(pytester, "test_timeout")) >= {0, 1, 2}
    assert not list(pytester.path.rglob("*.tmp"))
    goldens = {path.parent.name for path in (pytester.path / "golden").rglob("*.jsonl")}
    assert goldens == {n for n, outcome in found.items() if outcome == "PASSED"}


INTERRUPT = """
def test_interrupted(msprobe_engine, msprobe):
    # A job in the background of a shell ignores interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with msprobe.capture(msprobe_engine):
        during_step(
            layer(msprobe_engine), 3, lambda: os.kill(os.getpid(), signal.SIGINT)
        )
        generate(msprobe_engine, 8)
"""


def test_interrupt_in_the_middle_of_a_step(pytester, tokens):
    """Ctrl-C ends the run with pytest's code; complete steps are readable."""
    done = run(pytester, tokens, INTERRUPT)

    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout[-3000:]
    assert "KeyboardInterrupt" in done.stdout
    assert "Traceback" not in done.stderr
    assert complete_steps(capture_folder(pytester, "test_interrupted")) == {0, 1}


INTERRUPT_ALL = """
@pytest.mark.msprobe(decode_steps="all")
def test_interrupted(msprobe_engine, msprobe):
    # A job in the background of a shell ignores interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with msprobe.capture(msprobe_engine) as capture:
        act_later(capture.folder, lambda: os.killpg(0, signal.SIGINT))
        generate(msprobe_engine, 100)
"""


def test_interrupt_of_an_engine_in_other_processes(pytester, tokens):
    """Ctrl-C, which a terminal sends to the engine's core too, ends all of them."""
    done = run(
        pytester,
        tokens,
        INTERRUPT_ALL,
        is_group=True,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )

    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout[-3000:]
    assert "KeyboardInterrupt" in done.stdout
    assert "Traceback" not in done.stderr
    steps = complete_steps(capture_folder(pytester, "test_interrupted"))
    assert steps == set(range(len(steps)))
    assert 5 <= len(steps) < 100
    assert_half_written_are_no_steps(pytester.path)


KILLED = """
@pytest.mark.msprobe(decode_steps="all")
def test_killed(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine) as capture:
        kill_later("{title}", capture.folder)
        generate(msprobe_engine, 100)


def test_after_killed(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)
"""

KILLED_AT_THE_END = """
def test_killed_at_the_end(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        generate(msprobe_engine)
        for child in psutil.Process().children(recursive=True):
            if "VLLM::EngineCore" in " ".join(child.cmdline()):
                child.kill()
"""


OTHER_PROCESSES = """
def limit_workers(size):
    for child in psutil.Process().children(recursive=True):
        if "VLLM::Worker" in " ".join(child.cmdline()):
            child.rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_full_disk(msprobe_engine, msprobe):
    try:
        with msprobe.capture(msprobe_engine):
            generate(msprobe_engine, 2)
            limit_workers(50_000)
            generate(msprobe_engine, 2)
    finally:
        limit_workers(resource.RLIM_INFINITY)


def test_after_full_disk(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)


@pytest.mark.msprobe(decode_steps="all")
def test_timeout(msprobe_engine, msprobe):
    def alarm(*_):
        raise TimeoutError("the test took too long")

    signal.signal(signal.SIGALRM, alarm)
    with msprobe.capture(msprobe_engine) as capture:
        act_later(capture.folder, lambda: signal.setitimer(signal.ITIMER_REAL, 1e-4))
        generate(msprobe_engine, 100)


def test_after_timeout(msprobe_engine, msprobe):
    healthy(msprobe_engine, msprobe)
"""


def test_faults_of_an_engine_in_other_processes(pytester, tokens):
    """Full disk, timeout and a killed core, also at the end, fail their own tests."""
    tests = OTHER_PROCESSES + KILLED.replace("{title}", "VLLM::EngineCore")
    tests += KILLED_AT_THE_END
    done = run(pytester, tokens, tests, VLLM_ENABLE_V1_MULTIPROCESSING="1")

    expected = {}
    for name in ("full_disk", "timeout", "killed"):
        expected |= {f"test_{name}": "FAILED", f"test_after_{name}": "PASSED"}
    expected["test_killed_at_the_end"] = "FAILED"
    assert outcomes(done) == expected, done.stdout[-6000:]
    assert "the dump could not be written: [Errno 27] File too large" in done.stdout
    assert "TimeoutError: the test took too long" in done.stdout
    assert complete_steps(capture_folder(pytester, "test_full_disk")) == {0, 1}
    assert complete_steps(capture_folder(pytester, "test_timeout")) >= {0, 1, 2, 3}
    assert "msprobe: the core process of the engine died" in done.stdout
    summary = (
        r"test_killed_at_the_end - [\w.]+: .* \(the core process of the engine died"
    )
    assert re.search(summary, done.stdout), done.stdout[-3000:]
    at_the_end = complete_steps(capture_folder(pytester, "test_killed_at_the_end"))
    assert at_the_end == {0, 1, 2}
    assert_complete_up_to_the_kill(done, capture_folder(pytester, "test_killed"))


def assert_complete_up_to_the_kill(done, folder):
    """Where a rank stood is said; every step before that is readable."""
    assert re.search(r"msprobe: rank \d .* in step \d+", done.stdout)
    steps = complete_steps(folder)
    assert len(steps) >= 5
    assert steps == set(range(len(steps)))
    assert not list(folder.glob("capture*.jsonl"))


@pytest.fixture(scope="module", params=["0", "1"])
def parallel(request, tmp_path_factory, tokens):
    """A run with tensor-parallel workers: one is killed, in the end comes Ctrl-C.

    With 1 the engine's core has a process of its own.
    """
    place = SimpleNamespace(path=tmp_path_factory.mktemp("parallel"))
    tests = KILLED.replace("{title}", "VLLM::Worker_TP1") + INTERRUPT_ALL
    place.done = run(
        place,
        "tokens[:0] + tokens",  # sums are split over ranks: only the count is known
        tests,
        more="tensor_parallel_size: 2",
        is_group=True,
        VLLM_ENABLE_V1_MULTIPROCESSING=request.param,
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    return place


def test_a_killed_worker(parallel):
    """A killed rank is named with its last call, wherever the engine's core runs."""
    done = parallel.done

    found = outcomes(done)
    expected = {"test_killed": "FAILED", "test_after_killed": "PASSED"}
    assert {name: found.get(name) for name in expected} == expected, done.stdout[-6000:]
    notes = re.findall(r"msprobe: .*", done.stdout)
    died = r"msprobe: rank 1 \(process \d+\) died in step \d+, (last call \w+\.|before)"
    assert any(re.match(died, note) for note in notes), notes
    summary = (
        r"^FAILED test_it\.py::test_killed - [\w.]+: .* \(rank 1 \(process \d+\) died"
    )
    assert re.search(summary, done.stdout, re.MULTILINE), done.stdout[-3000:]
    assert_complete_up_to_the_kill(done, capture_folder(parallel, "test_killed"))


def test_interrupt_of_tensor_parallel_workers(parallel):
    """Ctrl-C, which every worker gets, ends all; each rank's steps are readable."""
    done = parallel.done

    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout[-3000:]
    assert "KeyboardInterrupt" in done.stdout
    assert "Traceback" not in done.stderr
    interrupted = done.stdout[done.stdout.index("KeyboardInterrupt") :]
    stood = r"msprobe: rank (\d) \(process \d+\) (?:is alive|died) in step \d+"
    assert sorted(re.findall(stood, interrupted)) == ["0", "1"], interrupted
    folder = capture_folder(parallel, "test_interrupted")
    found = steps_by_rank(folder)
    assert list(found) == ["rank0", "rank1"]
    for steps in found.values():
        assert steps == list(range(len(steps)))
        assert 5 <= len(steps) < 100
    # A step that only one rank has ended is no step of both.
    fewest, most = sorted(len(steps) for steps in found.values())
    assert most - fewest <= 1
    assert_half_written_are_no_steps(parallel.path)
    assert not list(folder.glob("capture*.jsonl"))
    assert not list((parallel.path / "golden").rglob("test_interrupted"))


def steps_by_rank(folder):
    """Numbers of the steps that each rank has completed; each holds all its calls."""
    found, calls = {}, {}
    for number, step in steps_of(folder).items():
        for name, rank in ranks_of(step).items():
            files = [json.loads(path.read_text()) for path in rank.glob("*.json")]
            assert len(files) == 3
            dump = json.loads((rank / "dump.json").read_text())
            assert list(dump["data"]) == calls.setdefault(name, list(dump["data"]))
            found.setdefault(name, []).append(number)
    assert all(len(names) > 50 for names in calls.values())
    return dict(sorted(found.items()))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_file_is_never_half_written(tmp_path):
    """However a writer is killed, a file under its final name is complete."""
    program = """
import sys
from pathlib import Path
from pytest_msprobe.dump.writer import write_atomically
number = 0
while True:
    write_atomically(Path(sys.argv[1]), str(number) * 4_000_000)
    number = (number + 1) % 10
    print(number, flush=True)
"""
    path = tmp_path / "dump.json"
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
        )
        for _ in range(3):
            child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        text = path.read_text()
        assert len(text) == 4_000_000
        assert len(set(text)) == 1


def test_what_an_engine_leaves_is_seen(tmp_path):
    """Processes and shared memory of an engine are found; what nobody uses is freed."""
    program = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, "VLLM::EngineCore"],
                          cwd=tmp_path) as child:  # fmt: skip
        assert left_processes(tmp_path) == {child.pid}
        child.kill()
    from pytest_msprobe.engine.launch import free_memory, shared_memory

    before = shared_memory()
    for name in ("vllm_test_{}", "psm_test{}", "{}-tp:0-[0-1]-cpushm_1"):
        memory = Path("/dev/shm", name.format(os.getpid()))  # noqa: S108 - its place
        memory.write_bytes(b"0" * 4096)
        try:
            assert memory in left_memory(before)
            with memory.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
                free_memory({memory})
                assert memory.exists()  # somebody uses it
            free_memory({memory})
            assert not memory.exists()
        finally:
            memory.unlink(missing_ok=True)
    assert not left_processes(tmp_path)


def test_steps_are_the_ranks_that_wrote_them(tmp_path):
    """A step folder without dump.json is not taken for a step of that rank."""
    for rank in ("rank0", "rank1"):
        folder = tmp_path / "step0" / rank
        folder.mkdir(parents=True)
        (folder / "stack.json").write_text("{}")
    (tmp_path / "step0" / "rank1" / "dump.json").write_text("{}")

    assert list(ranks_of(steps_of(tmp_path)[0])) == ["rank1"]
