# SPDX-License-Identifier: Apache-2.0
"""Commands that run pytest and then report on the run it left behind."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.report.github import render_annotations, render_summary
from pytest_msprobe.report.html import render_page
from pytest_msprobe.report.record import read_verdict
from pytest_msprobe.report.terminal import describe_tokens, summary_line

POINTER = "MSPROBE_RUN_POINTER"


def run_pytest(
    arguments: Sequence[str], folder: Path, **environment: str
) -> tuple[int, Path | None]:
    """Runs pytest in a process of its own.

    Args:
        arguments: pytest's arguments.
        folder: Where the run's place is noted.
        environment: Variables to set.

    Returns:
        pytest's exit code, and the run folder if there was one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pointer = folder / f"run.{os.getpid()}"
    pointer.unlink(missing_ok=True)
    variables = {**os.environ, **environment, POINTER: str(pointer.absolute())}
    done = subprocess.run(  # noqa: S603 - the user's own arguments
        [sys.executable, "-m", "pytest", *arguments], env=variables, check=False
    )
    if not pointer.is_file():
        return done.returncode, None
    run = Path(pointer.read_text(encoding="utf-8").strip())
    pointer.unlink()
    return done.returncode, run


def verdicts_of(run: Path) -> list[Verdict]:
    """All verdicts below a folder, by test and rank."""
    found = [read_verdict(path) for path in sorted(run.rglob("verdict*.json"))]
    return sorted(found, key=lambda verdict: (verdict.test, verdict.rank))


def update(arguments: Sequence[str]) -> int:
    """Runs tests, writes goldens of missing and failing ones, prints what moved."""
    given = [a for a in arguments if a.startswith("--msprobe-update")]
    options = list(arguments) if given else ["--msprobe-update=failing", *arguments]
    code, run = run_pytest(options, Path(".msprobe"))
    if run is None or not run.is_dir():
        return code
    print("\nwhat moved:")
    for verdict in verdicts_of(run):
        print(f"  {verdict.test}: {describe_move(verdict)}")
    return code


def describe_move(verdict: Verdict) -> str:
    """What an update changed for one test, and by how much."""
    if verdict.status == "missing":
        return "new golden"
    if verdict.status == "pass":
        return "nothing"
    if verdict.status == "incomparable":
        return f"another capture: {'; '.join(verdict.reasons[:3])}"
    moved = verdict.judged - verdict.equal
    text = f"{moved} of {verdict.judged} rows, {verdict.failed} beyond their limits"
    if verdict.status == "fail":
        text += f"; {summary_line(verdict)}"
    return f"{text}; {describe_tokens(verdict.tokens)}"


def gate(arguments: Sequence[str]) -> int:
    """Runs tests read-only, as CI does, and writes HTML, JUnit and a GitHub summary."""
    if any(argument.startswith("--msprobe-update") for argument in arguments):
        print(
            "pytest-msprobe gate: --msprobe-update: a gate writes no golden",
            file=sys.stderr,
        )
        return 4
    output = Path("msprobe-report")
    output.mkdir(exist_ok=True)
    options = [f"--junitxml={output / 'junit.xml'}", *arguments]
    code, run = run_pytest(options, Path(".msprobe"), CI="true")
    try:
        verdicts = verdicts_of(run) if run is not None and run.is_dir() else []
    except DumpFormatError as error:
        print(f"pytest-msprobe gate: {error}", file=sys.stderr)
        return 4
    page = output / "report.html"
    page.write_text(render_page(verdicts), encoding="utf-8")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(render_summary(verdicts))
        for line in render_annotations(verdicts):
            print(line)
    red = sum(not verdict.is_green for verdict in verdicts)
    print(f"gate: {len(verdicts)} verdicts, {red} red; {page}, {output / 'junit.xml'}")
    if code == 0 and not verdicts:
        print("pytest-msprobe gate: no test was judged", file=sys.stderr)
        return 4
    return code


def report(run: str, *, output: str | None) -> int:
    """Writes the HTML page of a saved run; 1 where a verdict is not green.

    Args:
        run: Run folder.
        output: File to write, None for `report.html` in the run.

    Raises:
        DumpFormatError: The run has no verdicts.
    """
    verdicts = verdicts_of(Path(run))
    if not verdicts:
        raise DumpFormatError(f"{run}: no verdict.json below it; expected a run folder")
    page = Path(output) if output is not None else Path(run) / "report.html"
    page.write_text(render_page(verdicts), encoding="utf-8")
    red = sum(not verdict.is_green for verdict in verdicts)
    print(f"{len(verdicts)} verdicts, {red} red; {page}")
    return 1 if red else 0
