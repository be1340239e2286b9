# SPDX-License-Identifier: Apache-2.0
"""dump.json, stack.json and construct.json."""

import json
import math

import numpy as np
import pytest
import torch

from pytest_msprobe.dump.writer import (
    DumpWriter,
    format_number,
    format_tree,
    line_of,
    render_stack,
    summarize,
    write_atomically,
)
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.calls import CallRecord, Scalar, StepRecord, TensorValue
from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.statistics.reference import ReferenceBackend
from pytest_msprobe.statistics.spec import rows_of, whole


def value_of(tensor, pieces=1):
    """The record of a tensor measured in pieces."""
    rows = np.zeros((pieces, ROW_WIDTH))
    parts = [[whole(tensor.shape)]]
    if pieces == 2:
        count = tensor.shape[0]
        parts = [
            [rows_of(tensor.shape, 0, 1, 0)],
            [rows_of(tensor.shape, 1, count - 1, 1)],
        ]
    ReferenceBackend().measure(tensor, parts, rows)
    return TensorValue(str(tensor.dtype), tuple(tensor.shape), False, rows)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1.0, -2.0, 4.0]), (4.0, -2.0, 1.0, math.sqrt(21))),
        (torch.tensor([3, -4]), (3, -4, None, None)),
        (torch.tensor([True, False]), (True, False, None, None)),
        (torch.tensor(True), (True, True, None, None)),
        (torch.tensor(-2.5), (-2.5, -2.5, -2.5, -2.5)),
        (torch.tensor(7), (7, 7, 7, 7)),
        (torch.zeros(0), (None, None, None, None)),
        (torch.tensor([1.0, NAN]), (NAN, NAN, NAN, NAN)),
        (torch.tensor([1.0, INF]), (INF, 1.0, INF, INF)),
        (torch.tensor([1.0, -INF]), (1.0, -INF, -INF, INF)),
        (torch.tensor([INF, -INF]), (INF, -INF, NAN, INF)),
        (torch.tensor([3 + 4j, 0j]), (5.0, 0.0, 2.5, None)),
        (torch.tensor([2.0], dtype=torch.float64), (2.0, 2.0, 2.0, 2.0)),
    ],
)
def test_summaries_are_msprobes(tensor, expected):
    """Max, Min, Mean and Norm of every kind of tensor are those msProbe documents."""
    found = summarize(value_of(tensor))

    for a, b in zip(found, expected, strict=True):
        assert a == b or (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b)


def test_pieces_are_combined():
    """The numbers of the dump are those of the whole tensor."""
    tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))

    found, expected = summarize(value_of(tensor, 2)), summarize(value_of(tensor))

    assert found == pytest.approx(expected, rel=1e-12)


def test_unmeasured_tensor_has_nulls():
    """A tensor without numbers still leaves a row that says so."""
    text = format_tree(TensorValue("torch.float32", (2,), True, None), "statistics")

    assert json.loads(text) == {
        "type": "torch.Tensor",
        "dtype": "torch.float32",
        "shape": [2],
        "Max": None,
        "Min": None,
        "Mean": None,
        "Norm": None,
        "requires_grad": True,
    }


def test_md5_stands_last_and_xor_alone():
    """The digest is added to the statistics with md5 and takes their place with xor."""
    value = value_of(torch.ones(2))
    value.digest = "0000abcd"

    md5 = json.loads(format_tree(value, "md5"))
    xor = json.loads(format_tree(value, "xor"))

    assert list(md5)[-1] == "md5"
    assert md5["Max"] == 1.0
    assert list(xor) == ["type", "dtype", "shape", "md5", "requires_grad"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "null"), (True, "true"), (3, "3"), (0.1, "0.1"), (NAN, "NaN"),
     (INF, "Infinity"), (-INF, "-Infinity")],
)  # fmt: skip
def test_numbers_are_written_as_msprobe_does(number, text):
    """Non-finite numbers are the bare tokens that Python's json reads."""
    assert format_number(number) == text


def test_a_dict_with_a_key_type_is_no_scalar():
    """A user's dict that has a key `type` stays a dict."""
    tree = {"type": value_of(torch.ones(1)), "value": Scalar(type="int", value=1)}

    found = json.loads(format_tree(tree, "statistics"))

    assert found["type"]["shape"] == [1]
    assert found["value"] == {"type": "int", "value": 1}


def here():
    """A frame of this file."""
    import sys

    frame = sys._getframe()
    return frame.f_code, frame.f_lasti, frame.f_lineno


def test_stack_lines_name_file_line_function_and_source():
    """A frame is rendered as msProbe does, with its source line."""
    code, offset, line = here()

    (text,) = render_stack([(code, offset)])

    assert text.startswith(
        f"File {__file__}, line {line_of(code, offset)}, in here, \n "
    )
    assert abs(line_of(code, offset) - line) <= 1


def test_own_frames_are_left_out():
    """Frames of the package do not appear in stacks."""
    assert render_stack([(format_tree.__code__, 0)]) == []


def make_writer(folder, **changes):
    """A writer for rank 0."""
    options = {
        "task": "statistics",
        "level": "mix",
        "summary_mode": "statistics",
        "keeps": lambda _side: True,
        "has_extra_info": True,
        "saves_tensors": False,
        **changes,
    }
    return DumpWriter(folder, "rank0", **options)


def make_step(number=0):
    """A step with a module around an API."""
    code, offset, _ = here()
    inner = CallRecord("Functional.linear.0.forward", "", 1, "Module.a.A.forward.0")
    inner.input_args = [value_of(torch.ones(2, 3)), None]
    inner.output = [value_of(torch.ones(2))]
    inner.stack = ((code, offset),)
    outer = CallRecord("Module.a.A.forward.0", "", 0, None)
    outer.input_kwargs = {"x": [value_of(torch.ones(1)), Scalar(type="int", value=2)]}
    outer.output = [None]
    outer.parameters = {}
    return StepRecord(number, calls=[inner, outer])


def test_files_of_a_step(tmp_path):
    """A step leaves three files with msProbe's keys in msProbe's order."""
    writer = make_writer(tmp_path)

    writer.write(make_step)
    writer.close()

    folder = tmp_path / "step0" / "rank0"
    dump = json.loads((folder / "dump.json").read_text())
    assert list(dump) == ["task", "level", "framework", "dump_data_dir", "data"]
    assert dump["dump_data_dir"] is None
    assert list(dump["data"]) == ["Functional.linear.0.forward", "Module.a.A.forward.0"]
    api, module = dump["data"].values()
    assert list(api) == ["input_args", "input_kwargs", "output"]
    assert list(module) == ["input_args", "input_kwargs", "output", "parameters"]
    assert module["input_kwargs"]["x"][1] == {"type": "int", "value": 2}
    assert api["input_args"][1] is None
    construct = json.loads((folder / "construct.json").read_text())
    assert construct == {
        "Functional.linear.0.forward": "Module.a.A.forward.0",
        "Module.a.A.forward.0": None,
    }
    stacks = json.loads((folder / "stack.json").read_text())
    assert stacks["0"][0] == ["Functional.linear.0.forward"]
    assert ", in here, \n " in stacks["0"][1][0]


def test_without_extra_info_there_is_one_file(tmp_path):
    """extra_info false leaves dump.json alone."""
    writer = make_writer(tmp_path, has_extra_info=False)

    writer.write_now(make_step())

    names = [path.name for path in (tmp_path / "step0" / "rank0").iterdir()]
    assert names == ["dump.json"]


def test_structure_writes_no_data(tmp_path):
    """The task structure keeps parents and stacks and leaves data empty."""
    writer = make_writer(tmp_path, task="structure")

    writer.write_now(make_step())

    folder = tmp_path / "step0" / "rank0"
    assert json.loads((folder / "dump.json").read_text())["data"] == {}
    assert json.loads((folder / "construct.json").read_text())


def test_sides_that_are_not_kept_are_absent(tmp_path):
    """data_mode leaves the keys of the other side out."""
    writer = make_writer(tmp_path, keeps=lambda side: side == "output")

    writer.write_now(make_step())

    dump = json.loads((tmp_path / "step0" / "rank0" / "dump.json").read_text())
    assert all("input_args" not in record for record in dump["data"].values())


def test_a_failing_disk_is_reported(tmp_path):
    """A step that cannot be written is an error with the path and what to do."""
    (tmp_path / "step0").write_text("a file where a folder should be")
    writer = make_writer(tmp_path)

    writer.write(make_step)

    with pytest.raises(CaptureError, match=r"could not be written.*free space"):
        writer.close()


def test_nothing_half_written_has_the_final_name(tmp_path, monkeypatch):
    """If writing breaks off, the old content stays and no temporary file remains."""
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")

    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"
