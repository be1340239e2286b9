# SPDX-License-Identifier: Apache-2.0
"""msProbe's keys."""

import json
from dataclasses import asdict

import pytest
import tools
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.config.debugger_config import (
    DebuggerConfig,
    config_from_json,
    parse_debugger_config,
    parse_numbers,
)
from pytest_msprobe.config.source import Source
from pytest_msprobe.errors import ConfigError

SEED = tools.GUIDE


def parse(data, **options):
    """A configuration from data that come from no file."""
    return parse_debugger_config(Source(None, data), **options)


def test_the_documented_example_is_taken_unchanged():
    """The config.json of msProbe's vLLM guide gives what it says."""
    config = parse(SEED)

    assert config.level == "mix"
    assert config.dump_path == "/home/data_dump"
    assert config.data_mode == ("all",)
    assert config.summary_mode == "statistics"
    assert config.has_modules
    assert config.has_functions


def test_defaults_are_msprobes():
    """An empty file means statistics at L1, everything, with stacks."""
    config = parse({})

    assert (config.task, config.level, config.risk_level) == (
        "statistics",
        "L1",
        "FOCUS",
    )
    assert config.extra_info
    assert config.rank == config.step == ()


def test_unknown_keys_are_ignored():
    """A config.json may hold any key that only msProbe knows."""
    assert parse({**SEED, "something": 1, "statistics": {"other": 2}}).level == "mix"


def test_arguments_win_over_the_file():
    """What is given in code takes the place of the file's key."""
    config = parse(SEED, overrides={"level": "L0", "step": ["1-3"], "task": None})

    assert config.level == "L0"
    assert config.step == (1, 2, 3)
    assert config.task == "statistics"


def test_structure_at_l1_becomes_mix():
    """The task structure at L1 is recorded at mix, as msProbe does."""
    assert parse({"task": "structure", "level": "L1"}).level == "mix"


BAD = [
    ({"task": "dump"}, "task"),
    ({"task": 3}, "task"),
    ({"task": "acc_check"}, "re-runs APIs"),
    ({"task": "nan_check"}, "not supported"),
    ({"level": "L3"}, "level"),
    ({"level": "L2"}, "NPU"),
    ({"level": ["L0"]}, "level"),
    ({"dump_path": 5}, "dump_path"),
    ({"rank": 1}, "rank"),
    ({"rank": ["a"]}, "rank"),
    ({"rank": [True]}, "rank"),
    ({"rank": [-1]}, "rank"),
    ({"step": "0"}, "step"),
    ({"step": ["3-1"]}, "step"),
    ({"step": [1.5]}, "step"),
    ({"step": [2_000_000]}, "step"),
    ({"step": [None]}, "step"),
    ({"async_dump": 1}, "async_dump"),
    ({"async_dump": "yes"}, "async_dump"),
    ({"extra_info": 0}, "extra_info"),
    ({"precision": None}, "precision"),
    ({"precision": "double"}, "precision"),
    ({"risk_level": "HIGH"}, "risk_level"),
    ({"custom_op_namespaces": "vllm"}, "custom_op_namespaces"),
    ({"custom_op_namespaces": [1]}, "custom_op_namespaces"),
    ({"support_wrap_ops": "missing.yaml"}, "support_wrap_ops"),
    ({"statistics": []}, "statistics"),
    ({"statistics": {"scope": "a"}}, "scope"),
    ({"statistics": {"scope": ["Torch.add.0.forward"]}}, "scope"),
    ({"statistics": {"scope": ["a", "b"]}}, "scope"),
    ({"statistics": {"scope": ["Module.a.B.forward.0"] * 2}, "level": "L1"}, "scope"),
    ({"statistics": {"scope": ["Torch.add.0.forward"] * 2}, "level": "L0"}, "scope"),
    ({"statistics": {"list": "Torch"}}, "list"),
    ({"statistics": {"list": [1]}}, "list"),
    ({"statistics": {"tensor_list": [None]}}, "tensor_list"),
    ({"statistics": {"data_mode": ["some"]}}, "data_mode"),
    ({"statistics": {"data_mode": ["all", "input"]}}, "data_mode"),
    ({"statistics": {"data_mode": "all"}}, "data_mode"),
    ({"statistics": {"summary_mode": "sha"}}, "summary_mode"),
    ({"load": {"path": "x"}}, "load"),
    ({"dump_enable": 1}, "dump_enable"),
    ({"max_bytes": 0}, "max_bytes"),
    ({"statistics": {"slice": [{"dim": 0}]}}, "slice"),
    ({"statistics": {"request_id": "a"}}, "request_id"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_bad_values_are_refused_in_one_line(change, named):
    """A wrong value names its key and what was expected, in one line."""
    with pytest.raises(ConfigError) as caught:
        parse({**SEED, **change})

    assert "\n" not in str(caught.value)
    assert named in str(caught.value)


@given(
    st.lists(st.integers(0, 50)),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))),
)
def test_numbers_expand_and_sort(singles, ranges):
    """Numbers and ranges become one sorted tuple without repetition."""
    items = [*singles, *(f"{min(r)}-{max(r)}" for r in ranges)]

    found = parse_numbers(items)

    expected = set(singles)
    for pair in ranges:
        expected.update(range(min(pair), max(pair) + 1))
    assert found == tuple(sorted(expected))


@pytest.mark.parametrize(
    ("modes", "kept"),
    [
        (("all",), {"input", "output"}),
        (("forward",), {"input", "output"}),
        (("backward",), set()),
        (("input",), {"input"}),
        (("forward", "output"), {"output"}),
        (("forward", "backward", "input", "output"), {"input", "output"}),
    ],
)
def test_data_mode_selects_sides(modes, kept):
    """A part is kept when its direction and its side are allowed."""
    config = DebuggerConfig(data_mode=modes)

    assert {side for side in ("input", "output") if config.keeps(side)} == kept


def test_configuration_survives_json():
    """A configuration sent to a worker arrives as it was."""
    config = DebuggerConfig(level="mix", step=(1, 2), names=("a",), dump_path="x")

    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
