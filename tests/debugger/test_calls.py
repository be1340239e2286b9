# SPDX-License-Identifier: Apache-2.0
"""Arguments of every kind as trees."""

import collections
import dataclasses
import enum
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.calls import (
    MAX_DEPTH,
    describe_value,
    walk_scalars,
    walk_tensors,
)
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.raw import CallSite
from pytest_msprobe.dump.writer import format_tree
from pytest_msprobe.model.calls import TensorValue

Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024 - untyped on purpose


@dataclasses.dataclass
class Record:
    """A dataclass as an argument."""

    x: object
    y: int = 1


class Color(enum.IntEnum):
    """An enum as an argument."""

    RED = 3


def describe(value, slot="input_args.0"):
    """A tree in which tensors are only named."""
    return describe_value(
        value, slot, lambda _t, s: TensorValue(s, (), requires_grad=False, rows=None)
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, {"type": "int", "value": 3}),
        (True, {"type": "bool", "value": True}),
        ("a", {"type": "str", "value": "a"}),
        (slice(1, None, 2), {"type": "slice", "value": [1, None, 2]}),
        (..., {"type": "ellipsis", "value": "..."}),
        (torch.Size([1, 2]), {"type": "torch.Size", "value": [1, 2]}),
        (
            torch.channels_last,
            {"type": "torch.memory_format", "format": "channels_last"},
        ),
        (np.int64(3), {"type": "int64", "value": 3}),
        (np.float32(0.5), {"type": "float32", "value": 0.5}),
        (np.complex64(1), {"type": "complex64", "value": None}),
        (Color.RED, {"type": "int", "value": 3}),
        (torch.float32, {}),
        (3 + 4j, None),
        (b"x", None),
        ({1, 2}, None),
        (len, None),
        (object(), None),
        ([1, [None]], [{"type": "int", "value": 1}, [None]]),
        ({"a": 1}, {"a": {"type": "int", "value": 1}}),
        ({3: ()}, {"3": []}),
        (Pair(1, None), {"left": {"type": "int", "value": 1}, "right": None}),
        (Record(None), {"x": None, "y": {"type": "int", "value": 1}}),
    ],
)
def test_values_are_described_as_msprobe_does(value, expected):
    """Every kind of argument has the JSON that msProbe documents."""
    assert describe(value) == expected


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("device", "cpu", "device"), ("device", 0, "device"), ("dtype", "auto", "dtype")],
)
def test_texts_in_place_of_dtypes_and_devices_are_named(name, value, kind):
    """`device="cpu"` is written as a device, as in msProbe."""
    found = describe(value, f"input_kwargs.{name}")

    assert found == {"type": f"torch.{kind}", "value": value}


def test_dtype_and_device_keywords_are_named():
    """Dtype and device are written where their name says what they are."""
    assert describe(torch.float32, "input_kwargs.dtype")["value"] == "torch.float32"
    device = describe(torch.device("cpu"), "input_kwargs.device")
    assert device["value"] == "cpu:None"


@pytest.mark.parametrize(
    ("array", "statistics"),
    [
        (np.array([1.0, 3.0]), (3.0, 1.0, 2.0, pytest.approx(10**0.5))),
        (np.array([3, 4]), (4, 3, 3.5, 5.0)),
        (np.zeros(0), (None,) * 4),
        (np.array(["a"]), (None,) * 4),
    ],
)
def test_numpy_arrays_have_numpys_statistics(array, statistics):
    """Arrays carry numpy's numbers, strings and empty ones none."""
    found = describe(array)

    names = ("Max", "Min", "Mean", "Norm")
    assert tuple(found[name] for name in names) == statistics
    assert found["shape"] == list(array.shape)


def test_deep_nesting_is_cut_off():
    """A value nested without end leaves a row that says so."""
    value = []
    value.append(value)

    text = json.dumps(describe(value))

    assert f"nested deeper than {MAX_DEPTH}" in text


def test_slots_of_nested_tensors():
    """Nested places are appended to the slot."""
    t = torch.ones(1)
    tree = describe([t, {"k": (t,)}, Pair(t, 1)])

    slots = [slot for slot, _ in walk_tensors(tree, "input_args.0")]

    assert slots == ["input_args.0.0", "input_args.0.1.k.0", "input_args.0.2.left"]
    assert walk_scalars(tree, "input_args.0") == [("input_args.0.2.right", 1)]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner)
    ),
)


@given(values)
def test_any_nested_value_is_valid_json(value):
    """No nesting of plain values crashes or gives invalid JSON."""
    json.loads(format_tree(describe(value), "statistics"))


def unusual():
    """Tensors that few people think of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized and nested ones
        return list(_unusual())


def _unusual():
    base = torch.arange(12.0).reshape(3, 4)
    yield "empty", torch.zeros(0, 3)
    yield "scalar", torch.tensor(2.0)
    yield "transposed", base.t()
    yield "expanded", base[:1].expand(5, 4)
    yield "strided", base[:, ::2]
    yield "flipped", base.flip(0)
    yield "meta", torch.empty(2, device="meta")
    yield "sparse", torch.eye(3).to_sparse()
    yield "quantized", torch.quantize_per_tensor(base, 0.1, 0, torch.qint8)
    yield "nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield "parameter", torch.nn.Parameter(base)
    yield "conjugated", torch.complex(base, base).conj()
    yield "subclass", base.as_subclass(type("Sub", (torch.Tensor,), {}))
    for name in ("float8_e4m3fn", "float8_e5m2fnuz", "uint16", "uint64", "complex32"):
        yield name, torch.ones(3).to(getattr(torch, name))


@pytest.mark.parametrize("mode", ["statistics", "md5", "xor"])
@pytest.mark.parametrize(("name", "tensor"), unusual(), ids=[n for n, _ in unusual()])
def test_any_tensor_leaves_a_row(name, tensor, mode):
    """Every kind of tensor has a record with dtype and shape, numbers or nulls."""
    collector = Collector(DebuggerConfig(level="L0", summary_mode=mode))
    collector.begin_step(0)
    call = collector.begin_call(CallSite("a.", "", is_module=False))
    before = tensor.clone() if name in ("expanded", "strided") else None
    collector.resume()
    collector.log_inputs(call, (tensor, [tensor]), {"x": tensor})
    collector.log_outputs(call, None)
    (record,) = materialize(collector.end_step()).calls

    text = format_tree([record.input_args, record.input_kwargs], mode)

    plain, nested = json.loads(text)[0]
    assert plain == nested[0]
    assert plain["dtype"] == str(tensor.dtype)
    if name not in ("empty", "meta", "sparse", "quantized", "nested") and mode != "xor":
        assert plain["Max"] is not None
    if before is not None:
        assert tensor.equal(before)


def saved(folder, *values, **named):
    """Files of a call of one module, and its record."""
    PrecisionDebugger.reset()

    class Takes(torch.nn.Module):
        def forward(self, *values, **named):
            return None

    model = torch.nn.Sequential()
    model.m = Takes()
    debugger = PrecisionDebugger(dump_path=str(folder), task="tensor", level="L0")
    debugger.start(model=model)
    model.m(*values, **named)
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    (rank,) = (folder / "step0").iterdir()
    files = {path.name: path for path in rank.glob("dump_tensor_data/*")}
    (entry,) = json.loads((rank / "dump.json").read_text())["data"].values()
    return files, entry


@pytest.mark.parametrize(("name", "tensor"), unusual(), ids=[n for n, _ in unusual()])
def test_any_tensor_is_saved_or_has_no_file(tmp_path, name, tensor):
    """A tensor has a file that can be read, or a record that names none."""
    files, entry = saved(tmp_path, tensor)

    file = entry["input_args"][0].get("data_name")
    assert list(files) == ([file] if file else [])
    assert (file is None) == (name in ("empty", "meta"))
    if file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates quantized ones
            assert torch.load(files[file]).dtype == tensor.dtype


def test_a_list_that_holds_itself_is_cut_off(tmp_path):
    """Neither arguments nor results without an end stop the recording."""
    endless = []
    endless.append(endless)

    class Gives(torch.nn.Module):
        def forward(self, x):
            return endless, x * 2

    model = torch.nn.Sequential()
    model.m = Gives()
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="mix")
    debugger.start(model=model)
    model.m(torch.ones(2, requires_grad=True))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert debugger.error is None
    (path,) = tmp_path.rglob("dump.json")
    assert f"nested deeper than {MAX_DEPTH}" in path.read_text()


def test_names_of_modules_of_any_kind_are_names_of_files(tmp_path):
    """A slash in a module's name is no folder."""
    model = torch.nn.Sequential()
    model.add_module("a/b", torch.nn.Identity())
    debugger = PrecisionDebugger(dump_path=str(tmp_path), task="tensor", level="L0")
    debugger.start(model=model)
    model(torch.ones(2))
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    assert debugger.error is None
    assert sorted(path.name for path in tmp_path.rglob("*.pt")) == [
        f"Module.a%2Fb.Identity.forward.0.{side}.0.pt" for side in ("input", "output")
    ]


def test_fake_tensors_have_no_file(tmp_path):
    """Tensors without data are recorded without any."""
    with FakeTensorMode():
        files, entry = saved(tmp_path, torch.ones(2))

    assert not files
    assert entry["input_args"][0]["type"].endswith("FakeTensor")


def test_arrays_of_numpy_are_saved(tmp_path):
    """Arrays have files as tensors have, those without a tensor's type another kind."""
    files, entry = saved(
        tmp_path,
        np.arange(3.0),
        [np.array(["a"]), np.zeros(0)],
        x=np.array([True]),
        y=np.array([{}], dtype=object),
    )

    prefix = "Module.m.Takes.forward.0"
    assert sorted(files) == [
        f"{prefix}.input.0.pt",
        f"{prefix}.input.1.0.npy",
        f"{prefix}.kwargs.x.pt",
    ]
    assert torch.load(files[f"{prefix}.input.0.pt"]).tolist() == [0.0, 1.0, 2.0]
    assert np.load(files[f"{prefix}.input.1.0.npy"]).tolist() == ["a"]
    assert entry["input_args"][0]["data_name"] == f"{prefix}.input.0.pt"
    assert "data_name" not in entry["input_args"][1][1]
    assert "data_name" not in entry["input_kwargs"]["y"]


@pytest.mark.parametrize("key", ["a/b", "../../../x", "/etc/x", "a\0b", "é", "x" * 250])
def test_keys_of_any_kind_are_names_of_files(tmp_path, key):
    """A key of a dictionary leads out of no folder and ends no recording."""
    files, entry = saved(tmp_path, {key: torch.ones(2), "plain": torch.ones(1)})

    names = [value.get("data_name") for value in entry["input_args"][0].values()]
    assert sorted(files) == sorted(name for name in names if name)
    assert len(files) == (1 if len(key) > 200 else 2)
    assert len(list(tmp_path.rglob("*.pt"))) == len(files)
