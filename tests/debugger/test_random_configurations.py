# SPDX-License-Identifier: Apache-2.0
"""Random configurations and values: no crash, whole files, read as written."""

import json
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import Model

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.dump.reader import read_dump
from pytest_msprobe.errors import ConfigError

SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NAMES = ["linear", "blocks.0", "Module.", "Torch.", "", "__add__", "nothing"]
CALLS = [
    "Module.embed.Embedding.forward.0",
    "Module.blocks.1.Block.forward.0",
    "Functional.linear.0.forward",
    "Functional.layer_norm.1.forward",
]
cuts = st.fixed_dictionaries(
    {},
    optional={
        "dim": st.integers(0, 2),
        "size": st.integers(0, 8),
        "begin": st.integers(-9, 9),
        "end": st.integers(-9, 9),
    },
)
sections = st.fixed_dictionaries(
    {},
    optional={
        "list": st.lists(st.sampled_from(NAMES), max_size=2),
        "scope": st.sampled_from([[], CALLS[:2], CALLS[2:], [CALLS[0], CALLS[3]]]),
        "tensor_list": st.lists(st.sampled_from(NAMES), max_size=1),
        "data_mode": st.lists(
            st.sampled_from(["forward", "backward", "input", "output"]), max_size=3
        ),
        "summary_mode": st.sampled_from(["statistics", "md5", "xor"]),
        "slice": st.lists(cuts, max_size=2),
        "request_id": st.sampled_from([None, "a", "b"]),
    },
)
TASKS = ("statistics", "tensor", "structure", "nan_check")
configs = st.fixed_dictionaries(
    {
        "task": st.sampled_from(TASKS),
        "level": st.sampled_from(["L0", "L1", "mix", "debug"]),
        "section": sections,
    },
    optional={
        "step": st.sampled_from([[], [0], ["1-3"], [5]]),
        "rank": st.sampled_from([[], [0], [1]]),
        "async_dump": st.booleans(),
        "extra_info": st.booleans(),
        "precision": st.sampled_from(["low", "high"]),
        "risk_level": st.sampled_from(["ALL", "FOCUS", "CORE"]),
        "custom_op_namespaces": st.just(["_C"]),
    },
)


def run(folder, config, backward):
    """Two steps of the toy model under a configuration."""
    path = folder / "config.json"
    data = {**config, config["task"]: config.pop("section")}
    path.write_text(json.dumps({**data, "dump_path": str(folder / "dump")}))
    model = Model()
    PrecisionDebugger.reset()
    try:
        debugger = PrecisionDebugger(config_path=str(path))
        for _ in range(2):
            debugger.start(model=model, rank_id=0, scheduled_tokens={"a": 2, "c": 3})
            result = model(torch.arange(5))
            if backward:
                result.sum().backward()
            debugger.save({"x": [result]}, "result")
            debugger.stop()
            debugger.step()
    finally:
        PrecisionDebugger.reset()
    return debugger


@SLOW
@given(configs, st.booleans())
def test_any_configuration_gives_files_that_can_be_read(config, backward):
    """Each is refused in one line, or runs without an error and leaves whole files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        refusal = ""
        try:
            debugger = run(folder, dict(config), backward)
            assert debugger.error is None
        except ConfigError as error:
            refusal = str(error)
        assert "\n" not in refusal
        for path in (folder / "dump").rglob("*.json"):
            content = json.loads(path.read_text())
            assert content is not None
        for path in (folder / "dump").rglob("dump.json"):
            names = [
                item
                for record in read_dump(path).data.values()
                for item in data_names(record)
            ]
            files = {p.name for p in path.parent.glob("dump_tensor_data/*.pt")}
            assert set(names) <= files


def data_names(value):
    """Names of files in a record."""
    if isinstance(value, dict):
        if value.get("data_name") is not None:
            return [value["data_name"]]
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [name for item in value for name in data_names(item)]


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 3), max_size=3).map(lambda s: torch.ones(s))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def expected(value):
    """A value as its record reads back."""
    if isinstance(value, torch.Tensor):
        return ("tensor", list(value.shape))
    if isinstance(value, list | tuple):
        return [expected(item) for item in value]
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return value


def found(value):
    """The same from a dump."""
    if isinstance(value, list):
        return [found(item) for item in value]
    if isinstance(value, dict):
        if value.get("type") == "torch.Tensor" and "shape" in value:
            return ("tensor", value["shape"])
        if set(value) == {"type", "value"} and isinstance(value["type"], str):
            item = value["value"]
            return "nan" if isinstance(item, float) and math.isnan(item) else item
        return {key: found(item) for key, item in value.items()}
    return value


class Echo(torch.nn.Module):
    """Returns what it gets."""

    def forward(self, *values):
        return values


@SLOW
@given(st.lists(values, max_size=3))
def test_nested_values_are_read_as_they_were_written(arguments):
    """Any nesting of plain values and tensors survives the dump."""
    model = torch.nn.Sequential(Echo())
    PrecisionDebugger.reset()
    with tempfile.TemporaryDirectory() as name:
        debugger = PrecisionDebugger(dump_path=name, level="L0")
        debugger.start(model=model, rank_id=0)
        model[0](*arguments)
        debugger.stop()
        debugger.step()
        PrecisionDebugger.reset()
        assert debugger.error is None
        (record,) = read_dump(Path(name) / "step0" / "rank0").data.values()

    assert found(record["input_args"]) == expected(arguments)
    assert found(record["output"]) == expected(arguments)
