# SPDX-License-Identifier: Apache-2.0
"""The same programs under the real msProbe and under this package.

The real tool lives in an environment of its own: `make interop` builds it and runs
these tests. Differences that are meant are listed in `INTENDED`, each with its reason;
every other one fails.
"""

import csv
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import scenario
import torch
from dumps import Intended, differences

import pytest_msprobe
from pytest_msprobe import PrecisionDebugger
from pytest_msprobe.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("MSPROBE_INTEROP", ROOT / ".interop")) / "bin" / "python"


def _missing():
    if not PYTHON.exists():
        return f"{PYTHON} is missing: run `make interop`"
    found = subprocess.run(
        [
            PYTHON,
            "-c",
            "import importlib.metadata as m; print(m.version('mindstudio-probe'))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.stdout.strip() != "26.2.0":
        return f"mindstudio-probe 26.2.0 is missing in {PYTHON.parents[1]}"
    return None


MISSING = _missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def config(program, section=None, **general):
    """One cell of the matrix: a program, its task section and the general keys."""
    return program, general, section or {}


FIRST, LAST = "Module.blocks.0.Sequential.forward.0", "Module.down.Linear.forward.1"
MATRIX = {
    "L0": config("steps", level="L0"),
    "L1": config("steps", level="L1"),
    "mix": config("steps", level="mix"),
    "mix-tensor": config("steps", level="mix", task="tensor"),
    "L0-structure": config("steps", level="L0", task="structure"),
    "mix-structure": config("steps", level="mix", task="structure"),
    "L1-structure": config("steps", level="L1", task="structure"),
    "mix-md5": config("steps", {"summary_mode": "md5"}, level="mix"),
    "mix-xor": config("steps", {"summary_mode": "xor"}, level="mix"),
    "md5-tensor": config("steps", {"summary_mode": "md5"}, level="mix", task="tensor"),
    "steps": config("steps", level="mix", step=[0, "2-4"]),
    "risk-all": config("steps", level="L1", risk_level="ALL"),
    "risk-core": config("steps", level="L1", risk_level="CORE"),
    "no-extra": config("steps", level="mix", extra_info=False),
    "high": config("steps", level="mix", precision="high"),
    "async": config("steps", level="mix", async_dump=True),
    "rank": config("steps", level="mix", rank=[0]),
    "forward": config("steps", {"data_mode": ["forward"]}, level="mix"),
    "input": config("steps", {"data_mode": ["input"]}, level="mix"),
    "output": config("steps", {"data_mode": ["forward", "output"]}, level="mix"),
    "scope-L0": config("steps", {"scope": [FIRST, LAST]}, level="L0"),
    "scope-L1": config(
        "steps",
        {"scope": ["Functional.layer_norm.0.forward", "Torch.softmax.0.forward"]},
        level="L1",
    ),
    "scope-mix": config("steps", {"scope": [FIRST, LAST]}, level="mix"),
    "list-L0": config("steps", {"list": ["blocks.0"]}, level="L0"),
    "list-L1": config("steps", {"list": ["linear", "Torch."]}, level="L1"),
    "list-mix": config(
        "steps", {"list": ["Module.blocks.1.Sequential", "__add__"]}, level="mix"
    ),
    "scope-list": config(
        "steps", {"scope": [FIRST, LAST], "list": ["linear"]}, level="mix"
    ),
    "tensor-list": config("steps", {"tensor_list": ["Linear", "softmax"]}, level="mix"),
    "list-tensor": config("steps", {"list": ["linear"]}, level="L1", task="tensor"),
    "slice": config(
        "steps",
        {"slice": [{"dim": 0, "begin": 1, "end": 3}, {"dim": 1, "size": 8, "end": -2}]},
        level="mix",
    ),
    "slice-md5": config(
        "steps", {"summary_mode": "md5", "slice": [{"begin": -1}]}, level="L0"
    ),
    "slice-tensor": config(
        "steps", {"slice": [{"dim": 1, "begin": 2}]}, level="mix", task="tensor"
    ),
    "toy-L0": config("toy", level="L0"),
    "toy-mix": config("toy", level="mix"),
    "bfloat16": config("low_precision", level="mix"),
    "float16": config("half", level="mix"),
    "float64": config("double", level="mix"),
    "model-list": config("model_list", level="mix"),
    "two-pairs": config("two_pairs", level="mix"),
    "init-step": config("init_step", level="L0"),
    "token-range": config("token_range", level="mix"),
    "token-range-L1": config("token_range", level="L1"),
    "requests": config("requests", {"request_id": "chosen"}, level="mix"),
    "requests-none": config("requests", level="mix"),
    "operators": config("operators", level="L1"),
    "in-place": config("in_place", level="L1"),
    "in-place-md5": config("in_place", {"summary_mode": "md5"}, level="L1"),
    "in-place-late": config("in_place", {"summary_mode": "md5"}, level="L1"),
    "values": config("values", level="L0"),
    "dtypes": config("dtypes", level="L0"),
    "dtypes-md5": config("dtypes", {"summary_mode": "md5"}, level="L0"),
    "dtypes-xor": config("dtypes_xor", {"summary_mode": "xor"}, level="L0"),
    "dtypes-rare": config("dtypes_rare", {"summary_mode": "xor"}, level="L0"),
    "dtypes-tensor": config("dtypes_saved", level="L0", task="tensor"),
    "train-L0": config("train", level="L0"),
    "train-L1": config("train", level="L1"),
    "train-mix": config("train", level="mix"),
    "train-tensor": config("train", level="mix", task="tensor"),
    "train-backward": config("train", {"data_mode": ["backward"]}, level="mix"),
    "train-input": config("train", {"data_mode": ["input"]}, level="mix"),
    "train-scope": config(
        "train",
        {"scope": ["Module.down.Linear.backward.1", "Module.down.Linear.backward.0"]},
        level="L0",
    ),
    "train-list": config("train", {"list": ["blocks.1"]}, level="mix"),
    "saved": config("saved", level="debug"),
    "saved-tensor": config("saved", level="debug", task="tensor"),
    "saved-md5": config("saved", {"summary_mode": "md5"}, level="debug"),
    "bench": config(
        "changed",
        {"summary_mode": "md5", "bench_path": "mix-md5", "diff_nums": 1},
        level="L0",
        task="tensor",
    ),
    "custom-api": config("custom_api", level="L1"),
    "one-module": config("one_module", level="L1"),
    "bench-mix": config(
        "changed",
        {"summary_mode": "md5", "bench_path": "mix-md5", "diff_nums": -1},
        level="mix",
        task="tensor",
    ),
    "values-tensor": config("values", level="L0", task="tensor"),
    "values-md5": config("values", {"summary_mode": "md5"}, level="L0"),
    "more-values": config("more_values", level="L0"),
    "more-values-tensor": config("more_values", level="L0", task="tensor"),
    "more-values-slice": config("more_values", {"slice": [{"begin": 1}]}, level="L0"),
    "failing": config("failing", level="mix"),
    "recursive": config("recursive", level="mix"),
    "hooked": config("hooked", level="mix"),
    "autocast": config("autocast", level="mix"),
    "another-thread": config("another_thread", level="mix"),
    "transforms": config("transforms", level="L1"),
    "apis": config("apis", level="L1", risk_level="ALL"),
    "apis-core": config("apis", level="L1", risk_level="CORE"),
    "apis-md5": config("apis", {"summary_mode": "md5"}, level="L1", risk_level="ALL"),
    "apis-tensor": config("apis", level="L1", task="tensor"),
    "checkpointed": config("checkpointed", level="mix"),
    "optimized": config("optimized", level="mix"),
    "train-md5": config("train", {"summary_mode": "md5"}, level="mix"),
    "train-all": config("train", level="mix", risk_level="ALL"),
    "train-output": config("train", {"data_mode": ["output"]}, level="mix"),
    "train-list-backward": config("train", {"list": ["backward"]}, level="L1"),
    "train-backward-tensor": config(
        "train", {"data_mode": ["backward", "input"]}, level="L0", task="tensor"
    ),
    "train-slice": config("train", {"slice": [{"begin": 1}]}, level="mix"),
    "train-async": config("train", level="mix", async_dump=True),
    "custom-namespace": config(
        "operators_of_a_library", level="L1", custom_op_namespaces=["msprobe_interop"]
    ),
    "switched": config("switched", level="mix", dump_enable=True),
}
# Cells in which the real tool's threads come to CRC-32 last, not first.
LATE = {"in-place-late"}

INTENDED = (
    Intended(
        r"Module\.compiled\.Compiled\.forward\.\d+",
        "record",
        "classes that go around nn.Module.__call__ are seen",
    ),
    Intended(
        r"Tensor\.__add__\.\d+\.forward",
        "parent",
        "and are the parents of what they call",
        ("toy-mix",),
    ),
    Intended(
        r".*",
        r".*\.(Mean|Norm)",
        "Mean and Norm exist at precision high",
        ("high",),
    ),
    Intended(
        r"(?!.*32).*",
        r".*\.(Mean|Norm)",
        "float64 tensors have Mean and Norm",
        ("float64",),
    ),
    Intended(
        r"Module\.d_float64(_strided)?\.Echo\.forward\.0",
        r".*\.(Mean|Norm)",
        "float64 tensors have Mean and Norm",
    ),
    Intended(
        r"Module\.d_float8_\w+\.Echo\.forward\.0",
        r".*\.(Max|Min|Mean|Norm|md5)",
        "float8 tensors have statistics and the xor checksum",
    ),
    Intended(
        r"Module\.d_\w+_0d\.Echo\.forward\.0",
        r".*\.md5",
        "xor of a 0-d tensor is that of its bytes, not the number itself",
        ("dtypes-xor",),
    ),
    Intended(
        r"Module\.d_(nan|inf|plus_inf|overflow)\.Echo\.forward\.0",
        r".*\.(Max|Min|Mean|Norm)",
        "a NaN makes all four NaN, and sums in float64 do not overflow",
    ),
    Intended(
        r"Tensor\.__matmul__\.0\.forward",
        r"input_args\.1\.md5",
        "a tensor of one column has a checksum as well",
        ("mix-xor",),
    ),
    Intended(
        r".*",
        r".*\.data_name|file",
        "a tensor or array that is empty, also once it is cut, has no file",
        ("slice-tensor", "values-tensor"),
    ),
    Intended(
        r".*",
        r".*\.(data_name|keys)",
        "data_name stands only where a file was written",
        ("bench", "bench-mix"),
    ),
    Intended(
        r"Module\..*",
        "input_args|input_kwargs",
        "a module around others keeps its inputs",
        ("bench", "bench-mix"),
    ),
    Intended(
        r"Module\..*\.input\.0\.pt",
        "file",
        "and has files of them",
        ("bench-mix",),
    ),
    Intended(
        r"Tensor\.__matmul__\.0\.forward",
        r"input_args\.1\.md5",
        "with bench_path the checksum of a strided tensor is of its own bytes too",
        ("bench-mix",),
    ),
    Intended(
        r"Functional\.embedding\.0\.backward",
        "parent",
        "a backward call has the backward of its forward's parent as parent, always",
    ),
    Intended(
        r"Functional\.linear\.\d+\.forward",
        "record",
        "linear is of risk class CORE",
        ("risk-core",),
    ),
    Intended(
        "",
        "order",
        "calls stand in the order of their ends at every data_mode",
        ("input", "train-input"),
    ),
    Intended(
        r"Torch\.softmax\.0\.forward|Module\.down\.Linear\.forward\.1",
        "output|parameters",
        "the last call of a scope is recorded whole",
        ("scope-L1", "scope-mix", "scope-list"),
    ),
    Intended(
        r"Functional\.linear\.3\.forward",
        "record",
        "and at mix with what it calls",
        ("scope-mix", "scope-list"),
    ),
    Intended(
        r"(Tensor\.__setitem__|msprobe_interop\.fill)\.\d+\.forward",
        r"output\.length",
        "a tensor written in place is an output",
    ),
    Intended(
        r"Tensor\.__setitem__\.\d+\.forward\.output\.1\.pt",
        "file",
        "and has a file",
    ),
    Intended(
        r".*",
        r".*\.md5",
        "CRC-32 is of the content at the call, not of what was written later",
        ("in-place-late",),
    ),
    Intended(
        r"Tensor\.numpy\.\d+\.forward",
        r"output\.0\.(Mean|Norm)",
        "sums over arrays of numpy are in float64 too",
    ),
    Intended(
        "",
        "order",
        "a call that fails stands where it ended",
        ("failing",),
    ),
    Intended(
        r"Module\.good\..*|Tensor\.exp\..*",
        "parent",
        "and is the parent of nothing behind it",
        ("failing",),
    ),
    Intended(
        r"Module\.again\.Again\.forward\.\d+|",
        "output|parameters|order",
        "a module that calls itself has its results",
        ("recursive",),
    ),
    Intended(
        r"Module\.blocks\.0\..*\.forward\.1",
        r"output|parameters|parent",
        "torch ends a second forward by an exception: it fails, without results",
        ("checkpointed",),
    ),
    Intended(
        r"Functional\.gelu\.1\.forward",
        "parent",
        "what it called is below it",
        ("checkpointed",),
    ),
    Intended(
        r"Tensor\.(__neg__|abs)\.0\.forward",
        "record",
        "a mode sees -a and abs(a)",
    ),
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of the real tool's dumps, of all cells, made in one process."""
    root = tmp_path_factory.mktemp("interop")
    jobs = [
        [program, write_config(root, "real", name), name in LATE]
        for name, (program, _, _) in MATRIX.items()
    ]
    jobs_file = root / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("real_tool.py"), jobs_file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    (root / "log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    failed = [job[1] for job, status in zip(jobs, statuses, strict=True) if status]
    assert not failed, (failed, done.stderr[-3000:])
    return root


def write_config(root, side, name):
    """Writes a cell's config.json for one side; returns its path."""
    _, general, section = MATRIX[name]
    if "bench_path" in section:  # another cell's dump of the same side
        section = {**section, "bench_path": str(root / side / section["bench_path"])}
    task = general.get("task", "statistics")
    folder = root / side
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    data = {"task": task, "dump_path": str(folder / name), **general, task: section}
    path.write_text(json.dumps(data))
    return str(path)


def record_ours(root, name):
    """Runs a cell's program under our debugger; returns the dump's folder."""
    folder = root / "ours" / name
    shutil.rmtree(folder, ignore_errors=True)
    reference = MATRIX[name][2].get("bench_path")
    if reference is not None:
        record_ours(root, reference)
    path = write_config(root, "ours", name)
    PrecisionDebugger.reset()
    scenario.TOOL, scenario.CONFIG = pytest_msprobe, path
    try:
        debugger = PrecisionDebugger(config_path=path)
        scenario.PROGRAMS[MATRIX[name][0]](debugger)
    finally:
        PrecisionDebugger.reset()
    assert debugger.error is None
    return folder


@pytest.mark.parametrize("name", MATRIX)
def test_dumps_are_those_of_the_real_tool(folders, name):
    """Names, values and files of a configuration are the real tool's, or listed."""
    ours = record_ours(folders, name)

    found = differences(folders / "real" / name, ours)

    unexpected = [
        difference
        for difference in found
        if not any(item.covers(name, difference) for item in INTENDED)
    ]
    assert not unexpected, "\n".join(map(str, unexpected[:30]))


def test_the_real_checksum_may_be_of_a_later_content(folders):
    """The real tool's CRC-32 is of what its thread meets, here what came last."""
    written = "Functional.relu_.0.forward", "Tensor.add_.0.forward"
    places = [(name, side) for name in written for side in ("input_args", "output")]
    last = f"{zlib.crc32(torch.ones(4).numpy().tobytes()):08x}"

    def checksums(folder):
        (path,) = folder.glob("step0/*/dump.json")
        data = json.loads(path.read_text())["data"]
        return [data[name][side][0]["md5"] for name, side in places]

    prompt = checksums(folders / "real" / "in-place-md5")
    late = checksums(folders / "real" / "in-place-late")
    ours = checksums(record_ours(folders, "in-place-late"))

    assert ours == prompt
    assert late == [last] * len(places)
    assert last not in ours


def compare(target, golden, out):
    """Runs `msprobe compare` and returns the rows of its table."""
    done = subprocess.run(
        [
            str(PYTHON.with_name("msprobe")),
            "compare",
            "-tp",
            target,
            "-gp",
            golden,
            "-o",
            out,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    tables = sorted(out.glob("*.csv"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(tables) == 1, done.stdout[-2000:]
    with tables[0].open(encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


COMPARED = ("mix", "mix-tensor", "mix-md5", "mix-xor", "bfloat16", "train-mix")


@pytest.mark.parametrize("name", COMPARED)
def test_the_real_comparison_takes_two_of_our_dumps(folders, tmp_path, name):
    """`msprobe compare` of two of our dumps has all rows, and all of them pass."""
    first = record_ours(folders, name)
    second = tmp_path / "second"
    shutil.copytree(first, second)

    rows = compare(second / "step0", first / "step0", tmp_path / "out")

    assert len(rows) > 40
    assert {row["Result"] for row in rows} == {"pass"}
    assert all(row["Bench Name"] != "N/A" for row in rows)


@pytest.mark.parametrize("name", COMPARED)
def test_the_real_comparison_takes_ours_against_its_own(folders, tmp_path, name):
    """`msprobe compare` finds each of its own rows in our dump, and none differs."""
    ours = record_ours(folders, name)
    theirs = folders / "real" / name

    rows = compare(theirs / "step0", ours / "step0", tmp_path / "out")

    assert len(rows) > 40
    assert {row["Result"] for row in rows} == {"pass"}
    assert [row["NPU Name"] for row in rows if row["Bench Name"] == "N/A"] == []


def test_the_real_comparison_sees_a_fault_in_our_dump(folders, tmp_path):
    """A planted fault is an error of `msprobe compare`, at the faulty row first."""
    good = record_ours(folders, "mix")
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    path = bad / "step0" / "rank0" / "dump.json"
    data = json.loads(path.read_text())
    faulty = data["data"]["Functional.linear.1.forward"]["output"][0]
    faulty["Norm"] *= 3
    faulty["Max"] = float("nan")
    path.write_text(json.dumps(data))

    rows = compare(bad / "step0", good / "step0", tmp_path / "out")

    wrong = [row["NPU Name"] for row in rows if row["Result"] != "pass"]
    assert wrong == ["Functional.linear.1.forward.output.0"]


# Not "dtypes": its mean of complex numbers and of sums that overflow is another one.
@pytest.mark.parametrize("name", ["mix", "mix-md5", "bfloat16", "train-mix"])
def test_we_judge_its_dumps(folders, name, capsys):
    """Its dump judged against ours is green: every row is there and equal enough."""
    ours = record_ours(folders, name)

    code = main(["compare", str(folders / "real" / name), str(ours)])

    assert code == 0, capsys.readouterr().out


def test_we_see_a_fault_in_its_dump(folders, tmp_path, capsys):
    """A number changed in its dump is found at its row, and a lost record too."""
    ours = record_ours(folders, "mix")
    bad = tmp_path / "bad"
    shutil.copytree(folders / "real" / "mix", bad)
    path = bad / "step1" / "rank0" / "dump.json"
    data = json.loads(path.read_text())
    data["data"]["Functional.linear.1.forward"]["output"][0]["Norm"] *= 1.01
    path.write_text(json.dumps(data))

    code = main(["compare", str(ours), str(bad)])

    assert code == 1
    assert "Functional.linear.1.forward" in capsys.readouterr().out
