# SPDX-License-Identifier: Apache-2.0
"""Helpers of the engine tests: real engines, captures, planted faults."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.match import pair_rows
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.dump.capture import read_capture

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".demo" / "tiny-qwen2"
PROMPT = "the first layer to differ is the one to look at"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "MSPROBE_ATTACH": "1",
}
ARGUMENTS = {"dtype": "bfloat16", "max_model_len": 128}
# The config.json of msProbe's vLLM guide.
GUIDE = {
    "task": "statistics",
    "dump_path": "/home/data_dump",
    "rank": [],
    "step": [],
    "level": "mix",
    "async_dump": False,
    "statistics": {
        "scope": [],
        "list": [],
        "data_mode": ["all"],
        "summary_mode": "statistics",
    },
}
# Engines in this process change its variables, LD_PRELOAD among them.
_AT_START = dict(os.environ)
_NUMBER = itertools.count()


def example(name):
    """A script of the examples folder as a module."""
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "examples" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def clean_environment(**changes):
    """Variables of a child process: those we were given without CI and our own."""
    variables = {
        name: value
        for name, value in _AT_START.items()
        if name != "CI" and not name.startswith(("MSPROBE_", "PYTEST_", "COV_"))
    }
    return {**variables, **changes}


def start(model=MODEL, **arguments):
    """A real engine with the deterministic settings."""
    from pytest_msprobe.engine.launch import engine_arguments, start_engine

    configured = {"model": str(model), **ARGUMENTS, **arguments}
    return start_engine(engine_arguments(configured, "test"))


def model_of(llm):
    """The model inside an in-process engine."""
    return runner_of(llm).get_model()


def runner_of(llm):
    """The model runner inside an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def control(llm, action, **arguments):
    """One reply of the worker's control method."""
    payload = json.dumps({"action": action, **arguments})
    return llm.collective_rpc("msprobe_control", args=(payload,))[0]


def generate(llm, prompts, tokens=3):
    """Greedy generation of a fixed number of tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return llm.generate(prompts, parameters, use_tqdm=False)


def capture(llm, folder, prompts=(PROMPT,), *, tokens=3, decode_steps=2, **config):
    """Records a generation and returns the capture file."""
    place = folder / f"capture{next(_NUMBER)}"
    settings = dataclasses.asdict(DebuggerConfig(**{"level": "L0", **config}))
    reply = control(
        llm, "start", config=settings, folder=str(place), decode_steps=decode_steps
    )
    assert reply["ok"], reply
    try:
        generate(llm, list(prompts), tokens)
    finally:
        reply = control(llm, "stop", test="test")
    assert reply["ok"], reply
    return read_capture(Path(reply["file"]))


def verdict_of(golden, candidate, rules=(), **options):
    """The verdict on a candidate."""
    return judge(golden, candidate, rules, **options).verdict


def unequal_rows(golden, candidate):
    """Names of the rows whose checksums differ."""
    pairs = pair_rows(golden, candidate)
    equal = pairs.is_equal
    return [row.text for row, same in zip(pairs.ids, equal, strict=True) if not same]


def assert_changed(golden, candidate, call, slot="output.0", *, inputs_equal=False):
    """The planted fault really changed this tensor.

    Args:
        golden: The capture without the fault.
        candidate: The capture with it.
        call: Path of a module, or an operator.
        slot: The slot that must have changed.
        inputs_equal: What went into the module must be the same, up to the first token
            that flipped: for faults that do not touch its inputs.
    """
    names = unequal_rows(golden, candidate)
    assert any(f".{call}." in name and f".{slot}@" in name for name in names), names[:5]
    if not inputs_equal:
        return
    from pytest_msprobe.compare.schedule import compare_schedules
    from pytest_msprobe.compare.tokens import positions_behind_flips
    from pytest_msprobe.model.names import parse_call_name

    pairs = pair_rows(golden, candidate)
    flips = positions_behind_flips(golden.header.requests, candidate.header.requests)
    schedule = compare_schedules(golden, candidate, flips)
    entered = [
        (row.text, same)
        for row, same in zip(pairs.ids, pairs.is_equal, strict=True)
        if row.slot.startswith("input") and not schedule.is_behind(row.segment)
        if getattr(parse_call_name(row.call), "module_path", "") == call
    ]
    assert entered, f"{call} has no inputs that could be checked"
    assert all(same for _, same in entered), [n for n, same in entered if not same]


@contextlib.contextmanager
def wrapped_forward(module, wrapper):
    """Plants a fault around a module's forward for a while.

    Args:
        module: The module.
        wrapper: Called with the original forward and its arguments.
    """
    original = module.forward
    before = module.__dict__.get("forward")

    def forward(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def changed_attribute(owner, name, value):
    """Plants a fault into an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
