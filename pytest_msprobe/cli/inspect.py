# SPDX-License-Identifier: Apache-2.0
"""Commands that read saved files: no engine, no torch."""

import os
import shlex
from collections import Counter
from pathlib import Path

from pytest_msprobe.compare.against import judge_against
from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.three_way import EXACT_NAME, HONEST_NAME, judge_three_ways
from pytest_msprobe.dump.capture import CaptureFile, StepLine, read_capture
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.golden.variants import choose
from pytest_msprobe.model.names import display_name
from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.report.record import read_verdict
from pytest_msprobe.report.terminal import render_failure, render_green

FINDING = 1
_SHOWN_FINDINGS = 20


def check(run: str, *, golden: str | None = None) -> int:
    """Judges the captures of a saved run against their goldens again.

    Captures are found beside their verdicts, wherever the run lies now, and are judged
    with the tolerances that the verdicts hold.

    Args:
        run: Run folder, or a folder in it.
        golden: Golden tree; if not given, each golden where the run found it, relative
            to the run.

    Returns:
        0, or 1 where a verdict is not green.
    """
    paths = sorted(Path(run).rglob("verdict*.json"))
    if not paths:
        raise DumpFormatError(f"{run}: no verdict.json below it; expected a run folder")
    if golden is not None and not Path(golden).is_dir():
        raise DumpFormatError(f"--golden {golden}: no such folder")
    code = 0
    for path in paths:
        old = read_verdict(path)
        if old.status == "missing":
            print(f"{old.test}: missing: no golden")
            code = FINDING
            continue
        candidate = read_capture(Path(old.capture))
        source = _golden_of(old, path, candidate, golden)
        verdict = _judge_again(source, candidate, old)
        code = max(code, print_verdict(verdict, _update_command(old)))
    return code


def _judge_again(source: Path, candidate: CaptureFile, old: Verdict) -> Verdict:
    """The verdict against a golden, another capture or a run's references."""
    reference = read_capture(source)
    rules = [rule.rule() for rule in old.rules]
    if source.name == EXACT_NAME:
        honest = read_capture(source.with_name(HONEST_NAME))
        return judge_three_ways(reference, honest, candidate)
    if reference.header.kind == "capture":
        return judge_against(reference, candidate, rules)
    return judge(reference, candidate, rules).verdict


def _golden_of(
    verdict: Verdict, path: Path, candidate: CaptureFile, tree: str | None
) -> Path:
    """The golden that a saved capture is judged against.

    Args:
        verdict: The verdict of the run.
        path: Where it was read from.
        candidate: The capture.
        tree: Golden tree, None for the one of the run.

    Raises:
        DumpFormatError: There is none.
    """
    recorded = Path(verdict.golden)
    if tree is None or _is_of_run(recorded):
        # What lies in the same run, or the golden where it was.
        if not recorded.is_file():
            message = f"{recorded}: no such golden, for {verdict.test}"
            raise DumpFormatError(message, hint="name the golden tree: --golden DIR")
        return recorded
    folder = Path(tree, *_place(recorded.parent, path.parent.absolute()))
    choice = choose(folder, candidate.header.key, candidate.header.rank)
    if choice.path is None:
        message = f"{folder}: no golden for {verdict.test}"
        raise DumpFormatError(message, hint="--golden names the root of a golden tree")
    return choice.path


def _is_of_run(path: Path) -> bool:
    """Whether this is a capture or reference of a run, rather than a golden."""
    return path.name.startswith(("capture.", "reference."))


def _place(golden: Path, run: Path) -> list[str]:
    """Test file and test name: goldens and runs have them as their last folders."""
    place: list[str] = []
    for a, b in zip(reversed(golden.parts), reversed(run.parts), strict=False):
        if a != b:
            break
        place.insert(0, a)
    return place


def _update_command(verdict: Verdict) -> str | None:
    """The command that accepts what a run captured.

    It is the recorded one, else the configuration is looked for where goldens have it:
    beside the golden tree. None where neither is known, or where no golden was judged.
    """
    if _is_of_run(Path(verdict.golden)):
        return None
    if verdict.command:
        return verdict.command
    for folder in Path(verdict.golden).parents:
        config = folder / "msprobe.yaml"
        if config.is_file():
            test, _, name = verdict.test.partition("::")
            if (folder / test).is_file():
                test = os.path.relpath(folder / test)
            parts = ["pytest", "--msprobe-config", os.path.relpath(config)]
            parts += ["--msprobe-update=failing", f"{test}::{name}"]
            return shlex.join(parts)
    return None


def print_verdict(verdict: Verdict, update_command: str | None) -> int:
    """Prints a verdict; returns 0, or 1 where it is not green."""
    if verdict.is_green:
        print(render_green(verdict))
        return 0
    print(render_failure(verdict, update_command=update_command))
    return FINDING


def show(path: str, *, has_calls: bool) -> int:
    """Prints what a golden or capture holds."""
    capture = read_capture(Path(path))
    header = capture.header
    calls = list(capture.calls())
    print(f"{header.kind} of {header.test or 'no test'}, format {header.msprobe}")
    print(f"numerics key {header.key}, rank {header.rank} of {header.world}")
    for name, value in header.provenance.items():
        print(f"  {name}: {value}")
    for request in header.requests:
        print(
            f"request {request.label}: {request.prompt_tokens} prompt tokens, "
            f"generated {request.tokens}"
        )
    kinds = Counter(name.partition(".")[0] for name in (call.c for _, call in calls))
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    steps = [entry for entry in capture.entries if isinstance(entry, StepLine)]
    print(f"{len(steps)} steps, {len(calls)} calls ({counted})")
    print(f"{len(capture.tensors)} distinct tensor segments")
    if has_calls:
        for step, call in calls:
            slots = ", ".join([*call.i, *call.o])
            print(f"{step:4d} {'  ' * call.l}{display_name(call.c)}: {slots}")
    return 0
