# SPDX-License-Identifier: Apache-2.0
"""Dumps judged against each other."""

import copy
import json
import math

import pytest

from pytest_msprobe.cli.main import main
from pytest_msprobe.compare.dumps import judge_dumps
from pytest_msprobe.errors import DumpFormatError


def tensor(dtype="torch.float32", **changes):
    """A tensor as it stands in a dump."""
    numbers = {"Max": 2.0, "Min": -1.0, "Mean": 0.5, "Norm": 4.0}
    head = {"type": "torch.Tensor", "dtype": dtype, "shape": [4, 4]}
    return {**head, **numbers, "requires_grad": False, **changes}


RECORD = {
    "input_args": [tensor(), {"type": "int", "value": 3}, None],
    "input_kwargs": {"x": [tensor()]},
    "output": [tensor("torch.bfloat16"), tensor("torch.int64", Mean=None, Norm=None)],
}


def write(folder, change=lambda _data: None, steps=1):
    """A dump of some steps with one record, changed; returns its folder."""
    for step in range(steps):
        data = {"Torch.add.0.forward": copy.deepcopy(RECORD)}
        change(data)
        place = folder / f"step{step}" / "rank0"
        place.mkdir(parents=True)
        (place / "dump.json").write_text(
            json.dumps({"task": "statistics", "level": "L1", "data": data})
        )
    return folder


def findings(tmp_path, change):
    """What is found where the second dump is changed."""
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", change)
    return [(f.row, f.what) for f in judge_dumps(good, bad).findings]


def test_equal_dumps_are_green(tmp_path):
    """All rows of all steps are judged, and none differs."""
    good, other = write(tmp_path / "a", steps=2), write(tmp_path / "b", steps=2)

    verdict = judge_dumps(good, other)

    assert verdict.is_green
    assert verdict.rows == 12


NAME = "Torch.add.0.forward"


@pytest.mark.parametrize(
    ("key", "factor", "is_found"),
    [
        ("Max", 1 + 1e-6, False),
        ("Max", 1 + 1e-3, True),
        ("Norm", 1 - 1e-3, True),
        ("Mean", 1 + 1e-3, True),
        ("Min", math.nan, True),
        ("Max", math.inf, True),
    ],
)
def test_statistics_have_limits(tmp_path, key, factor, is_found):
    """A statistic outside the limit of its type is found at its row, first one only."""

    def change(data):
        data[NAME]["input_args"][0][key] *= factor

    expected = [(f"{NAME}.input_args.0", key)] if is_found else []
    assert findings(tmp_path, change) == expected


def test_rounding_of_narrow_types_is_no_finding(tmp_path):
    """The real tool rounds Mean and Norm to the tensor's type."""

    def change(data):
        data[NAME]["output"][0]["Norm"] *= 1 + 2**-9

    assert findings(tmp_path, change) == []


@pytest.mark.parametrize(
    ("change", "row", "what"),
    [
        (lambda d: d.pop(NAME), NAME, "missing"),
        (lambda d: d[NAME].pop("output"), f"{NAME}.output.0", "missing"),
        (lambda d: d[NAME]["output"][0].update(shape=[1]), f"{NAME}.output.0", "shape"),
        (lambda d: d[NAME]["output"][1].update(Max=3), f"{NAME}.output.1", "Max"),
        (
            lambda d: d[NAME]["input_args"][1].update(value=4),
            f"{NAME}.input_args.1",
            "value",
        ),
        (
            lambda d: d[NAME]["output"][0].update(dtype="torch.half"),
            f"{NAME}.output.0",
            "dtype",
        ),
    ],
)
def test_what_is_missing_or_of_another_kind_is_found(tmp_path, change, row, what):
    """A lost record, a lost row, another shape, dtype or value are findings."""
    assert (row, what) in findings(tmp_path, change)


def test_equal_checksums_end_the_comparison(tmp_path):
    """Rows with one checksum are equal whatever was rounded; others are not."""

    def with_checksum(value, **changes):
        def change(data):
            data[NAME]["output"][0].update(md5=value, **changes)

        return change

    same = write(tmp_path / "a", with_checksum("12"))
    rounded = write(tmp_path / "b", with_checksum("12", Norm=9.0))
    assert judge_dumps(same, rounded).is_green

    def only_checksum(value):
        def change(data):
            data[NAME]["output"] = [
                {"type": "torch.Tensor", "dtype": "x", "shape": [1], "md5": value}
            ]

        return change

    first = write(tmp_path / "c", only_checksum("0x1"))
    second = write(tmp_path / "d", only_checksum("0x2"))
    (finding,) = judge_dumps(first, second).findings
    assert finding.what == "md5"


def test_a_lost_step_is_found_and_more_records_are_counted(tmp_path):
    """A step that only the golden has is a finding, records beyond it are none."""
    golden = write(tmp_path / "a", steps=2)
    other = write(tmp_path / "b", lambda d: d.update(more=RECORD))

    verdict = judge_dumps(golden, other)

    assert [(f.step, f.what) for f in verdict.findings] == [("step1", "missing")]
    assert verdict.extra == 1


def test_a_folder_without_a_dump_is_refused(tmp_path):
    """A path that holds no dump is an error that says what was expected."""
    with pytest.raises(DumpFormatError, match=r"no dump\.json"):
        judge_dumps(tmp_path, tmp_path)


def test_the_command_compares_folders_of_dumps(tmp_path, capsys):
    """`compare` takes dumps: exit code 1 and the row where they differ."""

    def change(data):
        data[NAME]["output"][0]["Max"] = 5.0

    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", change)

    assert main(["compare", str(good), str(good)]) == 0
    assert main(["compare", str(good), str(bad)]) == 1
    assert f"{NAME}.output.0: Max error 1.50e+00" in capsys.readouterr().out
    assert main(["compare", str(good), str(bad), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"] == 6
