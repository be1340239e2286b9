# SPDX-License-Identifier: Apache-2.0
"""Real engines of every kind for the tests, one at a time."""

import contextlib
import os
import sys
from pathlib import Path

import tools

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.engine.client import converse, start_capture, stop_capture

PARALLEL = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


@contextlib.contextmanager
def environment(**changes):
    """Variables for a while; None unsets one."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values):
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def started(model=tools.MODEL, variables=None, **arguments):
    """An engine that is ended afterwards."""
    from pytest_msprobe.engine.launch import stop_engine

    with environment(**(variables or {})):
        if variables and "vllm.envs" in sys.modules:
            # While an engine runs in this process vLLM keeps what it has read.
            sys.modules["vllm.envs"].disable_envs_cache()
        llm = tools.start(model, **arguments)
    try:
        yield llm
    finally:
        stop_engine(llm)


@contextlib.contextmanager
def recorded(llm, folder, files, *, decode_steps=2, **config):
    """Records a block on every rank; `files` is filled with the captures by rank."""
    settings = DebuggerConfig(**{"level": "L0", **config})
    converse(llm, start_capture(settings, folder, decode_steps=decode_steps))
    yield
    replies = converse(llm, stop_capture("test"))
    files.extend(read_capture(Path(reply["file"])) for reply in replies)


def capture_ranks(llm, folder, prompts=(tools.PROMPT,), *, tokens=3, **config):
    """Records a generation; returns the captures by rank."""
    files = []
    with recorded(llm, folder, files, **config):
        tools.generate(llm, list(prompts), tokens)
    return files
