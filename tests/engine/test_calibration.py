# SPDX-License-Identifier: Apache-2.0
"""Calibration with real engines: threads, batches and chunks really are other ones."""

import json
import os
import subprocess
import sys

import tools

from pytest_msprobe.dump.capture import read_capture

VARIABLES = {k: v for k, v in tools.ENVIRONMENT.items() if k != "MSPROBE_ATTACH"}
CONFIG = f"""
engine:
  model: {tools.MODEL}
  dtype: bfloat16
  max_model_len: 128
  env: {json.dumps(VARIABLES)}
"""
TEST = f"""
from vllm import SamplingParams

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


def test_a(msprobe_engine):
    prompts = [{tools.PROMPT!r}, "the others only inherit it"]
    msprobe_engine.generate(prompts, GREEDY, use_tqdm=False)
"""


def test_a_golden_is_calibrated(demo_model, tmp_path):
    """Runs differ in what they are told to; their noise is in the golden."""
    (tmp_path / "msprobe.yaml").write_text(CONFIG)
    (tmp_path / "test_a.py").write_text(TEST)

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", *command, "--msprobe-config", "msprobe.yaml"],
            cwd=tmp_path,
            env=tools.clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            # An engine in this process has taken one core for itself.
            preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count())),
        )

    written = run("pytest", "--msprobe-update=new")
    assert written.returncode == 0, written.stdout
    done = run("pytest_msprobe.cli.main", "calibrate", "--runs=threads,batch,chunks")

    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "golden").rglob("*.jsonl")
    golden = read_capture(path)
    assert golden.header.noise["runs"] == ["threads 2", "batch", "chunks of 12 tokens"]
    runs = sorted((tmp_path / ".msprobe" / "runs").iterdir())[-3:]
    captures = [read_capture(next(run.rglob("capture.*.jsonl"))) for run in runs]
    threads, batch, chunks = captures
    assert threads.header.provenance["threads"] == 2
    assert max(len(step.requests) for step in batch.steps) == 2
    assert max(step.tokens for step in chunks.steps) == 12
    # What moved is noise of the rows, and they are within limits now.
    noisy = [line.n for line in golden.tensors.values() if line.n]
    assert all(len(noise) == 5 for noise in noisy)
