# SPDX-License-Identifier: Apache-2.0
"""The commands that read saved files: check, compare and show."""

import json
import math
import shlex
import shutil
import subprocess
import sys

import captures
import msgspec
import pytest
import tools
from captures import KEY, OTHER_KEY, Network, request

from pytest_msprobe.cli.main import main
from pytest_msprobe.compare.judge import judge
from pytest_msprobe.dump.capture import encode, read_capture
from pytest_msprobe.golden.store import golden_bytes
from pytest_msprobe.model.limits import ROW_METRICS, Rule
from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.report.record import write_verdict

NETWORK = Network()
TEST = "tests/test_model.py::test_greedy[a b]"
PLACE = ("tests", "test_model.py", "test_greedy[a b]")
LOOSE = Rule("msprobe.yaml:4", limits=dict.fromkeys((*ROW_METRICS, "logprob"), 0.5))


def write(capture, path):
    """Writes a capture as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*capture.tensors.values(), *capture.entries]
    path.write_bytes(encode(capture.header, lines))
    return path


class SavedRun:
    """A project with a golden, and the run that one test left behind."""

    def __init__(self, root):
        self.root = root
        self.run = root / ".msprobe" / "runs" / "20260101-1"
        self.folder = self.run.joinpath(*PLACE)
        self.goldens = root / "golden"

    def save_golden(self, *, key=KEY, **fault):
        """Writes the golden of one numerics key."""
        made = NETWORK.run(requests=[request()], key=key, **fault)
        path = self.goldens.joinpath(*PLACE, f"{key}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(golden_bytes(made, TEST, key))
        return path

    def save(self, *rules, golden=None, **fault):
        """Writes the capture of a run with a fault, and the verdict on it."""
        golden = golden or self.save_golden()
        candidate = NETWORK.run(requests=[request()], test=TEST, **fault)
        path = write(candidate, self.folder / "capture.rank0.jsonl")
        verdict = judge(read_capture(golden), read_capture(path), rules).verdict
        write_verdict(verdict, self.folder / "verdict.json")
        return verdict


@pytest.fixture
def saved(tmp_path):
    """A project without a run."""
    return SavedRun(tmp_path / "project")


def test_a_saved_run_is_judged_again(saved, capsys):
    """The verdict is that of the run: the same module, exit code 1."""
    verdict = saved.save(after="b.x")

    assert main(["check", str(saved.run)]) == 1

    out = capsys.readouterr().out
    assert out.startswith("b.x: first to compute something else")
    assert f"{verdict.failed} outside their limits" in out


def test_the_tolerances_of_the_run_are_used(saved, capsys):
    """What passed under the run's own rules passes again, in order and by mode."""
    strict = Rule("msprobe.yaml:9", mode="cross", limits={"norm": 0.0})
    ignored = Rule("msprobe.yaml:11", rows="Module.a.*", ignore=True)
    assert saved.save(LOOSE, strict, ignored, after="b.x").is_green

    assert main(["check", str(saved.run)]) == 0

    assert "10 rows judged, 0 outside" in capsys.readouterr().out


def test_a_rule_of_the_run_is_named_again(saved, capsys):
    """A row that breaks a rule names its origin, file and line."""
    exact = Rule("msprobe.yaml:7", rows="Module.c.*", limits={"norm": 1e-9})
    saved.save(LOOSE, exact, after="c", factor=1.001)

    assert main(["check", str(saved.run)]) == 1

    assert "msprobe.yaml:7" in capsys.readouterr().out


def test_infinite_tolerances_are_used_again(saved):
    """A limit of infinity is written, read and allows everything."""
    everything = dict.fromkeys((*ROW_METRICS, "logprob"), math.inf)
    saved.save(Rule("r", limits=everything), after="b.x", factor=9)

    assert main(["check", str(saved.run)]) == 0


def test_a_project_may_be_moved(saved, tmp_path, capsys):
    """Captures and goldens are found relative to the run, from any working folder."""
    saved.save(after="b.x")
    moved = tmp_path / "other place"
    shutil.move(saved.root, moved)

    assert main(["check", str(moved / ".msprobe" / "runs")]) == 1

    out = capsys.readouterr().out
    assert str(moved / "golden") in out
    assert str(saved.root) not in out


def test_a_run_alone_needs_the_golden_tree(saved, tmp_path, capsys):
    """A run that left its project says which option names the goldens."""
    saved.save(LOOSE, after="b.x")
    moved = tmp_path / "downloads" / "artifact"
    shutil.copytree(saved.run, moved)

    assert main(["check", str(moved)]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no such golden, for tests/test_model.py::test_greedy" in error
    assert "--golden DIR" in error

    assert main(["check", str(moved), "--golden", str(saved.goldens)]) == 0
    assert main(["check", str(moved / PLACE[0]), "--golden", str(saved.goldens)]) == 0


def test_another_golden_tree_is_used_if_it_is_named(saved, tmp_path, capsys):
    """With --golden the variant of this key is taken from that tree."""
    saved.save(golden=saved.save_golden(key=OTHER_KEY))
    other = SavedRun(tmp_path / "other")
    other.save_golden(key=OTHER_KEY)
    other.save_golden(key=KEY, after="c")

    assert main(["check", str(saved.run)]) == 0
    assert "golden of another key" in capsys.readouterr().out
    assert main(["check", str(saved.run), "--golden", str(other.goldens)]) == 1
    assert capsys.readouterr().out.startswith("c: first to compute something else")


def test_a_golden_tree_without_the_test_is_wrong_use(saved, tmp_path, capsys):
    """A tree that is not there or lacks the test is one line with exit code 4."""
    saved.save()

    assert main(["check", str(saved.run), "--golden", str(tmp_path / "none")]) == 4
    assert "no such folder" in capsys.readouterr().err
    assert main(["check", str(saved.run), "--golden", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert f"{tmp_path.joinpath(*PLACE)}: no golden for {TEST}" in error


def test_captures_judged_against_each_other_are_found(saved, capsys):
    """Where one capture of a run was another's golden, it is so again."""
    first = NETWORK.run(requests=[request()])
    saved.save(golden=write(first, saved.run / "t" / "capture.rank0.jsonl"))
    saved.save_golden(after="c")

    assert main(["check", str(saved.run), "--golden", str(saved.goldens)]) == 0


def test_a_missing_golden_is_a_finding(saved, capsys):
    """A test that had no golden stays red."""
    saved.folder.mkdir(parents=True)
    write_verdict(Verdict(TEST, "missing"), saved.folder / "verdict.json")

    assert main(["check", str(saved.run)]) == 1
    assert capsys.readouterr().out == f"{TEST}: missing: no golden\n"


def test_the_worst_of_all_verdicts_is_the_exit_code(saved):
    """One red verdict among green ones is exit code 1."""
    saved.save()
    red = SavedRun(saved.root)
    red.folder = saved.folder.with_name("a_red_test")
    red.save(golden=saved.save_golden(), after="b.x")

    assert main(["check", str(saved.run)]) == 1
    assert main(["check", str(saved.folder)]) == 0


@pytest.mark.parametrize("content", [None, "{}", '{"schema": 99, "new": 1}'])
def test_what_is_no_run_is_wrong_use(saved, capsys, content):
    """A folder without verdicts, or with unreadable ones, is one line, exit code 4."""
    saved.folder.mkdir(parents=True)
    if content is not None:
        (saved.folder / "verdict.json").write_text(content)

    assert main(["check", str(saved.run)]) == 4

    error = capsys.readouterr().err
    assert error.startswith("pytest-msprobe: ")
    assert error.count("\n") == 1


def hint_of(text):
    """The command at the end of a failure, as arguments."""
    line = text.splitlines()[-1]
    assert line.startswith("if this is meant, update it: ")
    return shlex.split(line.partition(": ")[2])


def test_the_hint_is_a_valid_command(saved, monkeypatch, capsys):
    """The update that `check` proposes is one that pytest accepts as it stands."""
    saved.save(after="b.x")
    (saved.root / "msprobe.yaml").write_text("engine: {model: nowhere}\n")
    (saved.root / "tests").mkdir()
    (saved.root / "tests" / "test_model.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('x', ['a b'])\n"
        "def test_greedy(x): pass\n"
    )
    monkeypatch.chdir(saved.run)

    assert main(["check", "."]) == 1
    command = hint_of(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--collect-only", "-q", "-c", "/dev/null"],
        env=tools.clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert command[0] == "pytest"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 test collected" in done.stdout


def test_the_recorded_command_comes_first(saved, capsys):
    """A verdict that knows its command proposes that one."""
    verdict = saved.save(after="b.x")
    verdict.command = "pytest --msprobe-config some/file.yaml --msprobe-update=failing"
    write_verdict(verdict, saved.folder / "verdict.json")

    assert main(["check", str(saved.run)]) == 1
    assert hint_of(capsys.readouterr().out) == shlex.split(verdict.command)


def test_no_hint_is_better_than_a_wrong_one(saved, capsys):
    """Where no configuration is found no command is proposed."""
    saved.save(after="b.x")

    assert main(["check", str(saved.run)]) == 1
    assert "update" not in capsys.readouterr().out


def test_a_saved_run_is_judged_without_torch(saved):
    """Neither torch nor vLLM is needed to judge a saved run."""
    saved.save(after="b.x")
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['vllm'] = None\n"
        "from pytest_msprobe.cli.main import main\n"
        "sys.exit(main(['check', sys.argv[1]]))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(saved.run)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("b.x: ")


def test_compare_judges_two_files(tmp_path, capsys):
    """Two captures are judged with the default limits: exit code 0 or 1, no update."""
    good = write(NETWORK.run(), tmp_path / "good.jsonl")
    bad = write(NETWORK.run(after="b.y"), tmp_path / "bad.jsonl")

    assert main(["compare", str(good), str(good)]) == 0
    assert "12 bit-identical" in capsys.readouterr().out
    assert main(["compare", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("b.y: first to compute something else")
    assert "update" not in out


def test_compare_prints_json(tmp_path, capfd):
    """With --json the verdict is printed as data, whatever it is."""
    good = write(NETWORK.run(), tmp_path / "good.jsonl")
    bad = write(NETWORK.run(after="b.y"), tmp_path / "bad.jsonl")

    assert main(["compare", str(good), str(bad), "--json"]) == 1
    verdict = msgspec.json.decode(capfd.readouterr().out, type=Verdict)
    assert verdict.divergence.module == "b.y"
    assert main(["compare", str(good), str(good), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["status"] == "pass"


@pytest.mark.parametrize("command", ["compare", "show"])
def test_unreadable_files_are_wrong_use(tmp_path, capsys, command):
    """A file that is not there is one line with exit code 4."""
    paths = [str(tmp_path / "none.jsonl")] * (2 if command == "compare" else 1)

    assert main([command, *paths]) == 4
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


def test_show_tells_what_a_file_holds(saved, capsys):
    """Header, requests and counts of a golden are printed, its calls on request."""
    path = saved.save_golden(steps=2, provenance={"torch": "2.13"})

    assert main(["show", str(path)]) == 0
    short = capsys.readouterr().out
    assert main(["show", str(path), "--calls"]) == 0
    calls = capsys.readouterr().out

    assert short.startswith(f"golden of {TEST}, format {captures.FORMAT}\n")
    assert f"numerics key {KEY}, rank 0 of 1" in short
    assert "  torch: 2.13" in short
    assert "request 0: 4 prompt tokens, generated [5, 6]" in short
    assert "2 steps, 12 calls (12 Module)" in short
    assert "b.x" not in short
    assert calls.startswith(short)
    assert "   1     b.x: input_args.0, output.0" in calls


@pytest.mark.parametrize(
    "arguments", [[], ["check"], ["nothing"], ["show", "a", "--no-such-option"]]
)
def test_wrong_arguments_are_wrong_use(arguments, capsys):
    """A command line that is not understood has exit code 4 and says how it goes."""
    with pytest.raises(SystemExit) as left:
        main(arguments)

    assert left.value.code == 4
    assert "usage: pytest-msprobe" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [None, "b.y"])
def test_three_way_verdicts_are_judged_again(tmp_path, capsys, fault):
    """A verdict by two references is judged again from the files of the run."""
    candidate = write(NETWORK.run(after=fault), tmp_path / "capture.rank0.jsonl")
    exact = write(NETWORK.run(), tmp_path / "reference.exact.jsonl")
    write(NETWORK.run(), tmp_path / "reference.honest.jsonl")
    old = Verdict(TEST, "fail", golden=str(exact), capture=str(candidate))
    write_verdict(old, tmp_path / "verdict.json")

    code = main(["check", str(tmp_path)])

    text = capsys.readouterr().out
    assert code == (fault is not None)
    assert "R is the error relative to that of transformers" in text
    assert ("b.y: first to compute something else (R " in text) == (fault is not None)
