# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe compare`: dumps, folders, mapping files, msProbe's metrics."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from captures import Network, capture

from pytest_msprobe.cli.main import main
from pytest_msprobe.golden.store import capture_bytes

LINEAR = "Functional.linear.0.forward"
BLOCK = "Module.block.Block.forward.0"


def leaf(values, dtype="float32", **more):
    """A tensor as a dump has it."""
    values = np.asarray(values, dtype=np.float64)
    return {
        "type": "torch.Tensor",
        "dtype": f"torch.{dtype}",
        "shape": list(values.shape),
        "Max": float(values.max()),
        "Min": float(values.min()),
        "Mean": float(values.mean()),
        "Norm": float(np.linalg.norm(values)),
        "requires_grad": False,
        **more,
    }


X = np.linspace(-1, 1, 12).reshape(3, 4)


def records(factor=1.0):
    """An operator inside a module; a fault multiplies what the operator gives."""
    y = X * 2 * factor
    inputs = {"input_args": [leaf(X), {"type": "int", "value": 5}, None]}
    return {
        LINEAR: {**inputs, "input_kwargs": {}, "output": [leaf(y)]},
        BLOCK: {
            "input_args": [leaf(X)],
            "input_kwargs": {},
            "output": [leaf(y)],
            "parameters": {"weight": leaf(np.ones(4))},
        },
    }


def write_dump(root, steps, task="statistics"):
    """A dump of one rank."""
    for step, data in enumerate(steps):
        folder = root / f"step{step}" / "rank0"
        folder.mkdir(parents=True)
        content = {"task": task, "level": "mix", "framework": "pytorch", "data": data}
        (folder / "dump.json").write_text(json.dumps(content))
        block = next(name for name in data if name.startswith("Module."))
        parents = {LINEAR: block, block: None}
        (folder / "construct.json").write_text(json.dumps(parents))
    return root


@pytest.fixture
def dumps(tmp_path):
    """A dump, and one whose operator is off in the second step."""
    good = write_dump(tmp_path / "good", [records(), records()])
    bad = write_dump(tmp_path / "bad", [records(), records(1.1)])
    return good, bad


def compared(capfd, *arguments):
    """Exit code and the verdicts that were printed as JSON."""
    code = main(["compare", *map(str, arguments), "--json"])
    return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize("part", ["", "step1", "step1/rank0", "step1/rank0/dump.json"])
def test_dumps_are_judged_wherever_they_are_named(dumps, capfd, part):
    """A dump, a step, a rank and a file: equal ones pass, the operator is named."""
    good, bad = (side / part for side in dumps)

    code, (verdict,) = compared(capfd, good, good)
    assert (code, verdict["status"]) == (0, "pass")
    assert verdict["judged"] == verdict["equal"] > 5

    code, (verdict,) = compared(capfd, good, bad)
    assert (code, verdict["status"]) == (1, "fail")
    assert verdict["divergence"]["call"] == LINEAR
    assert verdict["divergence"]["module"] == "block"
    assert verdict["worst"][0]["observed"] == pytest.approx(0.1)


def test_missing_steps_fail(dumps, capfd):
    """A dump that lacks a step of the golden fails; single steps need no number."""
    good, _ = dumps
    short = write_dump(good.parent / "short", [records()])

    code, (verdict,) = compared(capfd, good, short)
    assert code == 1
    assert verdict["missing"] > 0
    assert compared(capfd, short, good)[0] == 0
    assert compared(capfd, good / "step1", short / "step0")[0] == 0


@pytest.mark.parametrize(
    ("name", "value", "metric"),
    [
        ("Max", float("nan"), "nonfinite"),
        ("Min", float("-inf"), "nonfinite"),
        ("dtype", "torch.float16", "dtype"),
        ("shape", [4, 3], "shape"),
        ("Mean", 5.0, "mean"),
    ],
)
def test_every_statistic_counts(dumps, capfd, name, value, metric):
    """A change of any statistic, of the dtype or the shape fails."""
    good, _ = dumps
    changed = records()
    changed[BLOCK]["output"][0][name] = value
    bad = write_dump(good.parent / "changed", [records(), changed])

    code, (verdict,) = compared(capfd, good, bad)

    assert code == 1
    assert verdict["worst"][0]["metric"] == metric


def test_values_and_parameters_count(dumps, capfd):
    """Another number among the arguments fails; a changed parameter is named."""
    good, _ = dumps
    argument, weight = records(), records()
    argument[LINEAR]["input_args"][1]["value"] = 6
    weight[BLOCK]["parameters"]["weight"] = leaf(np.ones(4) * 1.5)

    other = write_dump(good.parent / "argument", [argument, records()])
    code, (verdict,) = compared(capfd, good, other)
    assert code == 1
    assert verdict["worst"][0]["row"]["slot"] == "input_args.1"

    other = write_dump(good.parent / "weight", [weight, records()])
    _, (verdict,) = compared(capfd, good, other)
    assert verdict["divergence"]["kind"] == "weights"
    assert verdict["divergence"]["parameter"] == "weight"


def test_checksums_are_used_where_both_have_them(dumps, capfd):
    """Equal statistics with other checksums are changed; one side's do not matter."""
    good, _ = dumps
    first, second = records(), records()
    first[BLOCK]["output"][0]["md5"] = "00000001"
    second[BLOCK]["output"][0]["md5"] = "00000002"
    one = write_dump(good.parent / "one", [first, records()])
    two = write_dump(good.parent / "two", [second, records()])

    assert compared(capfd, one, two)[1][0]["status"] == "changed"
    assert compared(capfd, one, good)[1][0]["status"] == "pass"


def test_checksums_alone_decide_where_there_are_no_statistics(dumps, capfd):
    """Dumps of checksums (xor) fail where these differ."""
    good, _ = dumps
    sides = []
    for name, digest in (("one", "0x01"), ("two", "0x02")):
        data = records()
        value = data[BLOCK]["output"][0]
        for statistic in ("Max", "Min", "Mean", "Norm"):
            del value[statistic]
        value["md5"] = digest
        sides.append(write_dump(good.parent / name, [data]))

    code, (verdict,) = compared(capfd, *sides)

    assert code == 1
    assert verdict["worst"][0]["metric"] == "checksum"


def test_saved_tensors_are_compared_element_by_element(dumps, capfd):
    """Two swapped elements change no statistic and are found, with their place."""
    sides = []
    for name in ("one", "two"):
        data = copy.deepcopy(records())
        data[BLOCK]["output"][0]["data_name"] = "y.pt"
        root = write_dump(dumps[0].parent / name, [data], "tensor")
        folder = root / "step0" / "rank0" / "dump_tensor_data"
        folder.mkdir()
        values = torch.tensor(X * 2, dtype=torch.float32)
        if name == "two":
            values[2, 3], values[0, 0] = values[0, 0].clone(), values[2, 3].clone()
        torch.save(values, folder / "y.pt")
        sides.append(root)

    code, (verdict,) = compared(capfd, *sides)

    assert code == 1
    finding = verdict["worst"][0]
    assert finding["metric"] == "rel_l2"
    assert finding["element"] in ([0, 0], [2, 3])
    assert verdict["failed"] == 1


def test_the_table_has_msprobes_metrics(dumps, tmp_path, capsys):
    """Its columns, its per cent, its result: here an output that left its input."""
    path = tmp_path / "table.csv"
    assert main(["compare", *map(str, dumps), "--table", str(path)]) == 1
    rows = list(csv.DictReader(path.read_text().splitlines()))

    found = {row["NPU Name"]: row for row in rows if row["Step"] == "1"}
    output = found[f"{LINEAR}.output.0"]
    assert float(output["Max diff"]) == pytest.approx(0.2)
    assert output["NormRelativeErr"].startswith(("10.0", "9.99"))
    assert found[f"{LINEAR}.input.0"]["NormRelativeErr"] == "0"
    assert found[f"{LINEAR}.input.1"]["NPU Dtype"] == "<class 'int'>"
    assert output["Result"] in ("pass", "warning")
    assert {row["Result"] for row in rows if row["Step"] == "0"} == {"pass"}


@pytest.mark.parametrize(("factor", "result"), [(1.2, "warning"), (1.6, "error")])
def test_results_follow_msprobes_rules(tmp_path, capsys, factor, result):
    """Above 10 % with exact inputs is a warning, above 50 % an error."""
    sides = [write_dump(tmp_path / str(f), [records(f)]) for f in (1.0, factor)]
    path = tmp_path / "table.csv"
    main(["compare", *map(str, sides), "--table", str(path)])

    rows = {r["NPU Name"]: r for r in csv.DictReader(path.read_text().splitlines())}
    assert rows[f"{LINEAR}.output.0"]["Result"] == result


def renamed(data, old, new):
    """Records under other names."""
    return {name.replace(old, new): record for name, record in data.items()}


def test_layer_mapping_pairs_modules_of_other_names(dumps, tmp_path, capfd):
    """Modules that the file names are paired; without it their rows are missing."""
    other = write_dump(tmp_path / "o", [renamed(records(), "block.Block", "b.B")] * 2)
    mapping = tmp_path / "layers.yaml"
    mapping.write_text("b.B: block.Block\n")

    assert compared(capfd, dumps[0], other)[1][0]["missing"] > 0
    code, (verdict,) = compared(capfd, dumps[0], other, "--layer-mapping", mapping)
    assert (code, verdict["missing"]) == (0, 0)


def test_fuzzy_pairs_modules_of_other_classes(dumps, tmp_path, capfd):
    """The name of a module's class does not matter."""
    other = write_dump(tmp_path / "o", [renamed(records(), "Block", "Fused")] * 2)

    assert compared(capfd, dumps[0], other)[0] == 1
    assert compared(capfd, dumps[0], other, "--fuzzy")[0] == 0


def test_data_mapping_pairs_rows(dumps, tmp_path, capfd):
    """Rows that the file names are paired, whatever their slots are called."""
    data = records()
    data[BLOCK]["input_kwargs"] = {"x": data[BLOCK]["input_args"].pop()}
    other = write_dump(tmp_path / "o", [data, data])
    mapping = tmp_path / "rows.yaml"
    mapping.write_text(f"{BLOCK}.input.x: {BLOCK}.input.0\n")

    assert compared(capfd, dumps[0], other)[1][0]["missing"] == 2
    code, (verdict,) = compared(capfd, dumps[0], other, "--data-mapping", mapping)
    assert (code, verdict["missing"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "name", "near"),
    [
        ("b.Blck: block.Block", "b.Blck", "block.Block"),
        ("block.Block: block.Blok", "block.Blok", "block.Block"),
    ],
)
def test_modules_that_no_side_has_are_told(dumps, tmp_path, capsys, text, name, near):
    """A layer mapping whose names are nowhere is exit code 4, with the nearest."""
    path = tmp_path / "layers.yaml"
    path.write_text(text)

    code = main(["compare", *map(str, dumps), "--layer-mapping", str(path)])

    assert code == 4
    error = capsys.readouterr().err
    assert f"layer mapping: {name}: no such module; the nearest are" in error
    assert near in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected lines"),
        ("a: [", "not a readable mapping"),
        ("a: b", "no such row; the nearest are"),
    ],
)
def test_wrong_mappings_are_named(dumps, tmp_path, capsys, text, message):
    """A mapping file that is none, or names no row, is exit code 4 and one line."""
    path = tmp_path / "rows.yaml"
    path.write_text(text)

    code = main(["compare", *map(str, dumps), "--data-mapping", str(path)])

    assert code == 4
    assert message in capsys.readouterr().err


def test_rules_of_a_configuration_hold(dumps, tmp_path, capfd):
    """With --msprobe-config the tolerances are those of the file."""
    config = tmp_path / "msprobe.yaml"
    config.write_text("tolerances: {same: {rtol: 0.2, atol: 0}}\n")

    assert compared(capfd, *dumps)[0] == 1
    assert compared(capfd, *dumps, "--msprobe-config", config)[0] == 0


def test_rules_that_name_no_row_are_told(dumps, tmp_path, capsys):
    """A rule that names no row of any pair is warned of with the nearest rows."""
    config = tmp_path / "msprobe.yaml"
    rules = ["*block*", "Module.blokc.*"]
    text = "".join(f'    - {{rows: "{rows}", rel_l2: 0.5}}\n' for rows in rules)
    config.write_text(f"tolerances:\n  rules:\n{text}")

    main(["compare", *map(str, dumps), "--msprobe-config", str(config)])

    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "warning" in line
    ]
    assert "msprobe.yaml:4: rows 'Module.blokc.*' matches no row" in line
    assert BLOCK in line


def test_runs_are_compared_test_by_test(tmp_path, capfd):
    """Of folders of captures those at the same place are compared; others are told."""
    for run in ("one", "two"):
        for test in ("a", "b"):
            place = tmp_path / run / test
            place.mkdir(parents=True)
            content = capture_bytes(Network().run())
            (place / "capture.rank0.jsonl").write_bytes(content)
    (tmp_path / "one" / "c").mkdir()
    (tmp_path / "one" / "c" / "capture.rank0.jsonl").write_bytes(content)

    code = main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"])

    captured = capfd.readouterr()
    assert code == 1
    assert len(captured.out.splitlines()) == 2
    assert "c: only in the golden" in captured.err


def test_a_folder_without_captures_is_told(dumps, tmp_path, capsys):
    """An empty folder is exit code 4 and one line."""
    (tmp_path / "empty").mkdir()

    assert main(["compare", str(dumps[0]), str(tmp_path / "empty")]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("is_golden", [True, False])
def test_a_capture_is_compared_with_a_dump(tmp_path, capfd, factor, is_golden):
    """Segments are combined; what the dump holds of the same calls is judged."""
    split = [("0.first", X[:1]), ("0.prompt", X[1:])]
    doubled = [(name, part * 2) for name, part in split]
    name = "Module.m.M.forward.0"
    numbers = ("0.prompt", np.arange(6).reshape(3, 2))
    file = tmp_path / "capture.rank0.jsonl"
    inputs = {"input_args.0": split, "input_args.1": [numbers]}
    content = capture([(name, 0, inputs, {"output.0": doubled})])
    file.write_bytes(capture_bytes(content))
    integers = {"type": "torch.Tensor", "dtype": "torch.int64", "shape": [3, 2]}
    integers |= {"Max": 5, "Min": 0, "Mean": None, "Norm": None}
    record = {
        "input_args": [leaf(X, "bfloat16"), integers],
        "input_kwargs": {},
        "output": [leaf(X * 2 * factor, "bfloat16")],
    }
    root = write_dump(tmp_path / "dump", [{name: record}])

    sides = (file, root) if is_golden else (root, file)
    code, (verdict,) = compared(capfd, *sides)

    assert code == (factor != 1.0)
    assert (verdict["judged"], verdict["missing"]) == (3, 0)
    assert verdict["failed"] == (factor != 1.0)
