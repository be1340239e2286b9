# SPDX-License-Identifier: Apache-2.0
"""Repeats a failing test at level mix on a good and a bad side, names the operator.

Each side is a process of its own that runs pytest, in the folder where the command was
given. The bad side is the working tree. The good one is another environment's Python,
a saved capture, or a git ref: then modules of the user's repository are taken from a
worktree of it first, while the test itself stays the present one.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_msprobe.cli.runs import POINTER
from pytest_msprobe.compare.against import judge_against
from pytest_msprobe.compare.replay import own_errors, suspicious_modules
from pytest_msprobe.compat import (
    CAPTURE_VARIABLE,
    FIRST_FOLDERS,
    KEPT_MODULES,
    package_path,
)
from pytest_msprobe.dump.capture import read_capture, read_header
from pytest_msprobe.errors import DumpFormatError, EngineError
from pytest_msprobe.model.limits import Rule
from pytest_msprobe.model.names import display_name
from pytest_msprobe.report.record import read_verdict
from pytest_msprobe.report.terminal import render_failure, render_green

FINDING = 1
_OUTPUT_LINES = 15
# What must be recorded alike on both sides.
_SELECTION = ("task", "level", "scope", "names", "data_mode", "step", "risk_level")
_CAPTURES = "capture.rank*.jsonl"


@dataclass(frozen=True, slots=True)
class Side:
    """How one side is run.

    Attributes:
        title: What it is, for people.
        python: Interpreter.
        variables: Environment on top of this one's.
    """

    title: str
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)


def narrow(
    nodeid: str, good: str, arguments: Sequence[str], *, has_replay: bool = False
) -> int:
    """Judges a test's captures at mix against those of a side that is right.

    Args:
        nodeid: The test.
        good: Git ref, interpreter, capture file or run folder.
        arguments: Further arguments of pytest, `--msprobe-config` among them.
        has_replay: Also give each suspicious module its good inputs.

    Returns:
        0 where both sides agree, else 1.

    Raises:
        EngineError: A side cannot be run or records nothing.
        DumpFormatError: There is no such saved capture.
    """
    options = [nodeid, *arguments]
    if not any(option.startswith("--msprobe-config") for option in arguments):
        message = "narrow: --msprobe-config: not given; the test is run with it"
        raise EngineError(message, slug="narrow-config")
    saved = _saved_captures(Path(good))
    changes: dict[str, Any] = {"level": "mix"}
    if saved:
        signature = read_header(saved[0]).signature
        changes = {name: signature[name] for name in _SELECTION if name in signature}
        theirs, title = _by_name(saved), good
    else:
        kept = {"tensor_list": ["Module."]} if has_replay else {}
        with _good_side(good, nodeid) as side:
            title = side.title
            theirs = _by_place(*_run(side, options, {**changes, **kept}))
    bad = Side("the working tree")
    run, found = _run(bad, options, changes)
    ours = _by_name(found) if saved else _by_place(run, found)
    common = [name for name in ours if name in theirs]
    if not common:
        message = f"{title} has no capture of {nodeid}: {', '.join(theirs)}"
        raise EngineError(message, slug="narrow-captures")
    print(f"{nodeid} at level {changes.get('level')}; good: {title}, bad: {bad.title}")
    code = 0
    for name in common:
        verdict = _judge(theirs[name], ours[name])
        code = max(code, verdict)
        if has_replay and verdict:
            _replay(bad, options, theirs[name], ours[name])
    return code


def _replay(side: Side, options: Sequence[str], good: Path, bad: Path) -> None:
    """Runs the bad side with good inputs in its suspicious modules; prints errors.

    Args:
        side: The bad side.
        options: Arguments of pytest.
        good: Capture of the good side, its dump beside it.
        bad: Capture of the bad side.

    Raises:
        EngineError: The good side kept no tensors, or the bad side recorded nothing.
    """
    if not any(good.parent.glob("step*/*/dump_tensor_data")):
        message = f"--replay: {good.parent}: no tensors were kept there"
        hint = "record it with the task tensor, or name a git ref or an interpreter"
        raise EngineError(message, slug="narrow-replay", hint=hint)
    first, second = read_capture(good), read_capture(bad)
    names = suspicious_modules(first, second)
    load = {"path": str(good.parent.resolve()), "modules": names, "dumps": True}
    _, found = _run(side, options, {"level": "L0", "load": load})
    (replayed,) = [path for path in found if path.name == bad.name][:1]
    print("\nerrors of the modules that differ, with the good side's inputs:")
    print(f"  {'own':>9}  {'whole':>9}  module")
    for error in own_errors(first, second, read_capture(replayed), names):
        print(f"  {error.own:9.3g}  {error.whole:9.3g}  {display_name(error.call)}")


def _judge(good: Path, bad: Path) -> int:
    """Prints the verdict on one capture."""
    verdict = judge_against(read_capture(good), read_capture(bad), _rules_beside(bad))
    if verdict.is_green:
        print(render_green(verdict))
        return 0
    print(render_failure(verdict, update_command=None))
    return FINDING


def _rules_beside(capture: Path) -> list[Rule]:
    """The tolerances that the test's run applied."""
    rank = capture.name.removeprefix("capture.rank").removesuffix(".jsonl")
    suffix = f".rank{rank}" if rank != "0" else ""
    path = capture.with_name(f"verdict{suffix}.json")
    return [rule.rule() for rule in read_verdict(path).rules] if path.is_file() else []


def _saved_captures(path: Path) -> list[Path]:
    """Capture files that a path leads to; empty where it is something else.

    Raises:
        DumpFormatError: A folder without captures, or with those of several tests.
    """
    if path.is_file():
        return [path] if path.suffix == ".jsonl" else []
    if not path.is_dir():
        return []
    found = sorted(path.rglob(_CAPTURES))
    folders = sorted({str(file.parent) for file in found})
    if len(folders) != 1:
        named = f"those of {', '.join(folders[:3])}" if folders else "none"
        message = f"--good {path}: expected the captures of one test, found {named}"
        raise DumpFormatError(message, hint="name the folder of one test")
    return found


def _by_name(captures: Sequence[Path]) -> dict[str, Path]:
    """Captures of one test by their rank."""
    return {str(read_header(path).rank): path for path in captures}


def _by_place(run: Path, captures: Sequence[Path]) -> dict[str, Path]:
    """Captures of a run by test, capture and rank."""
    return {str(path.relative_to(run)): path for path in captures}


def _run(
    side: Side, options: Sequence[str], changes: dict[str, Any]
) -> tuple[Path, list[Path]]:
    """Runs the test on one side; returns the run folder and its captures.

    Args:
        side: The side.
        options: Arguments of pytest.
        changes: Fields of the capture's configuration.

    Raises:
        EngineError: It recorded nothing.
    """
    with tempfile.TemporaryDirectory(prefix="msprobe-") as name:
        pointer = Path(name, "run")
        variables = {
            **os.environ,
            **side.variables,
            CAPTURE_VARIABLE: json.dumps(changes),
            POINTER: str(pointer),
        }
        command = [side.python, "-m", "pytest", *options]
        done = subprocess.run(  # noqa: S603 - the user's own arguments
            command, env=variables, capture_output=True, text=True, check=False
        )
        run = Path(pointer.read_text(encoding="utf-8")) if pointer.is_file() else None
    found = sorted(run.rglob(_CAPTURES)) if run is not None else []
    if run is None or not found:
        output = (done.stdout + done.stderr).strip().splitlines()
        last = "\n".join(output[-_OUTPUT_LINES:])
        message = f"{side.title}: the test recorded nothing:\n{last}"
        raise EngineError(message, slug="narrow-run")
    return run, found


@contextlib.contextmanager
def _good_side(good: str, nodeid: str) -> Iterator[Side]:
    """The side that is right, as long as it is needed.

    Args:
        good: An interpreter or a git ref.
        nodeid: The test, whose own modules are the present ones on both sides.

    Raises:
        EngineError: It is neither an interpreter nor a git ref.
    """
    if Path(good).is_file() and os.access(good, os.X_OK):
        with package_path() as folder:
            inherited = os.environ.get("PYTHONPATH")
            paths = os.pathsep.join([folder, *filter(None, [inherited])])
            yield Side(good, good, {"PYTHONPATH": paths})
        return
    commit = _git("rev-parse", "--verify", "--quiet", f"{good}^{{commit}}")
    root = _git("rev-parse", "--show-toplevel")
    if not commit or not root:
        message = f"--good {good!r}: no git ref, interpreter, capture or run folder"
        raise EngineError(message, slug="narrow-good")
    with tempfile.TemporaryDirectory(prefix="msprobe-good-") as name:
        tree = Path(name, "tree")
        if _git("worktree", "add", "--detach", str(tree), commit) is None:
            message = f"--good {good!r}: git worktree add failed in {root}"
            raise EngineError(message, slug="narrow-worktree")
        try:
            here = tree / Path.cwd().resolve().relative_to(Path(root).resolve())
            folders = [here / "src", here, tree / "src", tree]
            first = os.pathsep.join(str(f) for f in folders if f.is_dir())
            inherited = os.environ.get("PYTHONPATH")
            test = Path(nodeid.partition("::")[0])
            kept = [*test.parts, test.stem, "conftest"]
            variables = {
                FIRST_FOLDERS: first,
                KEPT_MODULES: os.pathsep.join(kept),
                "PYTHONPATH": os.pathsep.join([first, *filter(None, [inherited])]),
            }
            yield Side(f"{good} ({commit[:10]})", variables=variables)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str | None:
    """Output of a git command, None where it failed."""
    done = subprocess.run(  # noqa: S603 - arguments are not interpreted by a shell
        ["git", *arguments],  # noqa: S607 - the user's git
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None
