# SPDX-License-Identifier: Apache-2.0
"""Programs that record into one folder, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import tools
import torch

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.dump.layout import ranks_of, steps_of
from pytest_msprobe.errors import CaptureError

PROGRAM = """
import json, os, sys, torch
from pytest_msprobe import PrecisionDebugger

def start(dump_path, rank):
    PrecisionDebugger(dump_path=dump_path, level="L1").start(rank_id=rank)
    torch.ones(2).exp()

def finish():
    PrecisionDebugger.stop()
    PrecisionDebugger.step()

def reset():
    PrecisionDebugger.reset()

def fork():
    child = os.fork()
    if not child:
        sys.exit(0)
    os.waitpid(child, 0)

for line in sys.stdin:
    name, *arguments = json.loads(line)
    globals()[name](*arguments)
    print("done", flush=True)
"""


class Program:
    """A program in another process that does what it is told."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=tools.clean_environment(),
        )
        self.pid = self._process.pid

    def tell(self, name, *arguments):
        """Lets it call one of its functions."""
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def end(self):
        """Ends it."""
        with self._process as process:
            process.stdin.close()


@pytest.fixture(scope="module")
def program():
    """A program that records for several tests."""
    made = Program()
    yield made
    made.end()


@pytest.fixture
def other(program):
    """That program, with no debugger when a test begins and ends."""
    yield program
    program.tell("reset")


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def record(dump, rank=0, level="L1"):
    """Records a step of this process."""
    debugger = PrecisionDebugger(dump_path=str(dump), level=level)
    debugger.start(rank_id=rank)
    torch.ones(2).sin()
    debugger.stop()
    debugger.step()
    assert debugger.error is None


def names(dump):
    """Records of the first step by rank."""
    return {
        rank: list(json.loads((folder / "dump.json").read_text())["data"])
        for rank, folder in ranks_of(steps_of(dump)[0]).items()
    }


THEIRS, OURS = ["Tensor.exp.0.forward"], ["Tensor.sin.0.forward"]


def test_a_second_program_may_not_write_the_same_rank(other, tmp_path):
    """Its start names the folder and the process; the first one loses nothing."""
    other.tell("start", str(tmp_path), 0)

    expected = (
        f"{tmp_path}: process {other.pid} is writing rank0 there; "
        "give every engine and every program a dump_path of its own"
    )
    for level in ("L1", "debug"):
        with pytest.raises(CaptureError) as caught:
            record(tmp_path, level=level)
        assert str(caught.value) == expected
        torch.ones(2).sin()
        PrecisionDebugger.stop()
        PrecisionDebugger.step()
        PrecisionDebugger.reset()
    other.tell("finish")
    assert names(tmp_path) == {"rank0": THEIRS}


def test_variables_of_another_program_are_not_overwritten(other, tmp_path):
    """A program that only saves variables is told so by `save`."""
    other.tell("start", str(tmp_path), 0)
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="debug")
    debugger._rank, debugger._is_rank_known = 0, True

    with pytest.raises(CaptureError, match=rf"process {other.pid} is writing rank0"):
        debugger.save(torch.ones(2), "x")


def test_the_folder_is_free_when_the_other_program_is_done(other, tmp_path):
    """What was refused goes on by itself once nobody else writes there."""
    other.tell("start", str(tmp_path), 0)
    with pytest.raises(CaptureError):
        record(tmp_path)
    other.tell("reset")

    record(tmp_path)

    PrecisionDebugger.reset()
    assert names(tmp_path) == {"rank0": OURS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step0"]


def test_ranks_of_one_job_share_a_folder(other, tmp_path, caplog):
    """Each process writes the folder of its rank, and nobody is warned."""
    other.tell("start", str(tmp_path), 1)

    record(tmp_path, rank=0)

    other.tell("finish")
    assert names(tmp_path) == {"rank0": OURS, "rank1": THEIRS}
    assert not caplog.records


def test_programs_without_a_rank_are_warned(other, tmp_path, caplog):
    """Each has a folder of its own, and who comes second is told of the first."""
    other.tell("start", str(tmp_path), None)

    record(tmp_path, rank=None)

    other.tell("finish")
    assert names(tmp_path) == {f"proc{other.pid}": THEIRS, f"proc{os.getpid()}": OURS}
    (entry,) = caplog.records
    assert entry.getMessage() == (
        f"msprobe: {tmp_path}: process {other.pid} (proc{other.pid}) writes there as "
        "well; unless it is one job, give every program a dump_path of its own"
    )


def test_a_program_may_make_a_second_debugger(tmp_path):
    """A debugger that follows another one of its program writes the same folder."""
    for _ in range(2):
        record(tmp_path)
        PrecisionDebugger.reset()

    assert names(tmp_path) == {"rank0": OURS}


def test_a_forked_process_that_ends_does_not_free_the_folder(other, tmp_path):
    """The folder stays that of the program, whatever becomes of its children."""
    other.tell("start", str(tmp_path), 0)
    other.tell("fork")

    with pytest.raises(CaptureError, match=rf"process {other.pid} is writing rank0"):
        record(tmp_path)


def test_what_a_killed_program_left_is_no_lock(tmp_path):
    """Its complete steps are there; the next program writes at once, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other threads may be about
        killed = os.fork()
    if not killed:
        try:
            record(tmp_path)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert names(tmp_path) == {"rank0": OURS}
    assert (tmp_path / ".rank0.lock").read_text() == str(killed)
    (tmp_path / "step0" / "rank0" / "dump.json").unlink()

    record(tmp_path)

    assert names(tmp_path) == {"rank0": OURS}
