# SPDX-License-Identifier: Apache-2.0
"""msProbe's keys."""

import json
from dataclasses import asdict

import pytest
import tools
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.config.debugger_config import (
    Cut,
    DebuggerConfig,
    Load,
    config_from_json,
    parse_debugger_config,
    parse_numbers,
)
from pytest_msprobe.config.source import Source, read_source
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


def test_functions_are_met_by_the_mode_unless_asked_otherwise():
    """The key function_hooks chooses how calls of functions are met."""
    assert parse({}).function_hooks == "mode"
    assert parse({"function_hooks": "replace"}).function_hooks == "replace"


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


LOAD = {"path": ".", "modules": ["Module.a.B.forward.0"]}
BENCH = {"summary_mode": "md5", "bench_path": "."}
BAD = [
    ({"task": "dump"}, "task"),
    ({"task": 3}, "task"),
    ({"task": "acc_check"}, "re-runs APIs"),
    ({"task": "free_benchmark"}, "removed"),
    ({"task": ["tensor"]}, "task"),
    ({"level": 0}, "level"),
    ({"level": "l0"}, "level"),
    ({"rank": {"0": 1}}, "rank"),
    ({"rank": [0.0]}, "rank"),
    ({"rank": ["0-"]}, "rank"),
    ({"step": ["-1"]}, "step"),
    ({"step": ["1,2"]}, "step"),
    ({"step": [False]}, "step"),
    ({"step": ["0-9999999"]}, "step"),
    ({"async_dump": None}, "async_dump"),
    ({"extra_info": "true"}, "extra_info"),
    ({"risk_level": 1}, "risk_level"),
    ({"dump_path": ["a"]}, "dump_path"),
    ({"support_wrap_ops": 3}, "support_wrap_ops"),
    ({"max_bytes": "1"}, "max_bytes"),
    ({"max_bytes": True}, "max_bytes"),
    ({"dump_enable": "on"}, "dump_enable"),
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
    ({"function_hooks": "swap"}, "function_hooks"),
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
    ({"load": []}, "load: expected an object"),
    ({"load": {"path": "missing"}}, "load.path"),
    ({"load": {**LOAD}, "level": "L1"}, "load"),
    ({"load": {"path": "."}}, "load.modules"),
    ({"load": {"path": ".", "modules": ["Torch.add.0.forward"]}}, "load.modules"),
    ({"load": {"path": ".", "modules": ["Module.a.B.forward.0"] * 2}}, "load.modules"),
    ({"load": {**LOAD, "step": [0, 1]}}, "load.step"),
    ({"load": {**LOAD, "rank": ["a"]}}, "load.rank"),
    ({"load": {**LOAD, "dump_after_load": 1}}, "load.dump_after_load"),
    ({"dump_enable": 1}, "dump_enable"),
    ({"max_bytes": 0}, "max_bytes"),
    ({"statistics": {"slice": {"dim": 0}}}, "slice"),
    ({"statistics": {"slice": [3]}}, "slice"),
    ({"statistics": {"slice": [{"dim": -1}]}}, "slice"),
    ({"statistics": {"slice": [{"size": -1}]}}, "slice"),
    ({"statistics": {"slice": [{"dim": True}]}}, "slice"),
    ({"statistics": {"slice": [{"end": "3"}]}}, "slice"),
    ({"statistics": {"slice": [{"start": 3}]}}, "slice"),
    ({"statistics": {"request_id": 3}}, "request_id"),
    ({"statistics": {"bench_path": "."}}, "bench_path"),
    ({"statistics": {"diff_nums": 3}}, "diff_nums"),
    ({"task": "tensor", "tensor": {"bench_path": 3}}, "bench_path"),
    ({"task": "tensor", "tensor": {"bench_path": "missing"}}, "bench_path"),
    ({"task": "tensor", "tensor": {"bench_path": "."}}, "summary_mode"),
    ({"task": "tensor", "tensor": {**BENCH, "diff_nums": -2}}, "diff_nums"),
    ({"task": "tensor", "tensor": {**BENCH, "diff_nums": "1"}}, "diff_nums"),
    ({"task": "tensor", "tensor": {**BENCH, "diff_nums": True}}, "diff_nums"),
    ({"task": "diff_check"}, "bench_path"),
    ({"task": "tensor", "tensor": {"list": {}}}, "tensor.list"),
    ({"task": "structure", "structure": 3}, "structure"),
    ({"task": "nan_check", "nan_check": {"list": [1]}}, "nan_check.list"),
    ({"task": "overflow_check", "overflow_check": {"scope": ["a"]}}, "scope"),
]


def test_there_are_enough_bad_values():
    """The table holds at least sixty cases."""
    assert len(BAD) >= 60


@pytest.mark.parametrize(("change", "named"), BAD)
def test_bad_values_are_refused_in_one_line(tmp_path, change, named):
    """A wrong value names its file and key and what was expected, in one line."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SEED, **change}))

    with pytest.raises(ConfigError) as caught:
        parse_debugger_config(read_source(path))

    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)


def test_older_names_of_tasks_are_taken():
    """overflow_check is nan_check, diff_check the task tensor with a reference."""
    assert parse({"task": "overflow_check"}).task == "nan_check"
    config = parse({"task": "diff_check", "diff_check": {"bench_path": "."}})
    assert (config.task, config.summary_mode, config.diff_nums) == ("tensor", "md5", 1)


def test_slices_have_defaults_and_the_last_of_a_dimension_counts():
    """A rule needs no key, and a later one for the same dimension replaces it."""
    rules = [{"begin": 1}, {"dim": 2, "end": -1}, {"size": 8, "end": 4}]

    config = parse({"statistics": {"slice": rules}})

    assert config.slice == (Cut(0, 8, 0, 4), Cut(2, None, 0, -1))


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
        (("backward", "input"), set()),
    ],
)
def test_data_mode_selects_sides(modes, kept):
    """A part is kept when its direction and its side are allowed."""
    config = DebuggerConfig(data_mode=modes)

    assert {side for side in ("input", "output") if config.keeps(side)} == kept


def test_configuration_survives_json():
    """A configuration sent to a worker arrives as it was."""
    config = DebuggerConfig(
        level="mix",
        step=(1, 2),
        names=("a",),
        dump_path="x",
        slice=(Cut(1, None, 2, 3),),
        load=Load("y", ("Module.a.B.forward.0",)),
    )

    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
