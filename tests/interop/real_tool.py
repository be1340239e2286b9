# SPDX-License-Identifier: Apache-2.0
"""Runs programs under the real msProbe: `python real_tool.py JOBS.json`.

JOBS.json is a list of `[program, config.json, is_late]`. The tool can be constructed
once a process, so that each job runs in a child of its own; how it ended is printed as
JSON.

The tool computes CRC-32 in threads that read the live memory of a tensor while the
program goes on. Which content they meet is left to chance; here it is settled: a sum is
computed before the program goes on or, in a late job, when the tool asks for it.
"""

import atexit
import json
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("MSPROBE_LOG_LEVEL", "3")

import msprobe.pytorch
import scenario
import torch
from msprobe.core.dump.data_dump.data_processor import pytorch_processor


class PromptPool(ThreadPoolExecutor):
    """A pool that is done with everything before the program goes on."""

    def submit(self, function, *args):
        future = super().submit(function, *args)
        future.exception()
        return future


class LatePool(ThreadPoolExecutor):
    """A pool that begins only when a result is asked for."""

    def submit(self, function, *args):
        return LateFuture(partial(super().submit, function, *args))


class LateFuture:
    """Stands for the future of work that has not begun."""

    def __init__(self, submit):
        self._submit = submit

    def result(self):
        return self._submit().result()


def run(program, config, is_late):
    """Runs one job in a child process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        # With one core the tool would make a pool of no threads, and fail.
        os.cpu_count = lambda: 2
        pytorch_processor.ThreadPoolExecutor = LatePool if is_late else PromptPool
        debugger = msprobe.pytorch.PrecisionDebugger(config_path=config)
        scenario.TOOL, scenario.CONFIG = msprobe.pytorch, config
        scenario.PROGRAMS[program](debugger)
        status = 0
    except BaseException:  # noqa: BLE001 - reported by the status
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The tool writes level debug and what is left open when a process exits.
        atexit._run_exitfuncs()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    statuses = [run(*job) for job in jobs]
    sys.stdout.write(f"{json.dumps(statuses)}\n")
