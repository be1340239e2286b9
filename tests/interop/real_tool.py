# SPDX-License-Identifier: Apache-2.0
"""Runs programs under the real msProbe: `python real_tool.py JOBS.json`.

JOBS.json is a list of `[program, config.json]`. The tool can be constructed once a
process, so that each job runs in a child of its own; how it ended is printed as JSON.
"""

import atexit
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("MSPROBE_LOG_LEVEL", "3")

import msprobe.pytorch
import scenario
import torch


def run(program, config):
    """Runs one job in a child process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        # With one core the tool would make a pool of no threads, and fail.
        os.cpu_count = lambda: 2
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
    statuses = [run(program, config) for program, config in jobs]
    sys.stdout.write(f"{json.dumps(statuses)}\n")
