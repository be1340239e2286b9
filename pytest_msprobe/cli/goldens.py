# SPDX-License-Identifier: Apache-2.0
"""Commands that change the golden tree: review and accept a run, prune orphans."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pytest_msprobe.cli.explain import find_config
from pytest_msprobe.cli.runs import describe_move, verdicts_of
from pytest_msprobe.compare.ranks import find_disagreement
from pytest_msprobe.config.settings import read_settings
from pytest_msprobe.dump.capture import read_capture, read_header
from pytest_msprobe.errors import ConfigError, DumpFormatError, GoldenError
from pytest_msprobe.golden.guard import is_ci, is_written
from pytest_msprobe.golden.store import golden_bytes, remove, write_bytes
from pytest_msprobe.golden.variants import file_name
from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.report.terminal import render_failure

LOCKS = Path(".msprobe") / "locks"
FINDING = 1


def _open_verdicts(run: str, test: str | None) -> list[Verdict]:
    """Verdicts of a run that an update would write goldens for.

    Raises:
        DumpFormatError: The run has no verdicts.
    """
    verdicts = verdicts_of(Path(run))
    if not verdicts:
        raise DumpFormatError(f"{run}: no verdict.json below it; expected a run folder")
    return [
        verdict
        for verdict in verdicts
        if is_written("failing", verdict.status)
        and (test is None or test in verdict.test)
    ]


def review(run: str, *, test: str | None) -> int:
    """Shows what accepting a run would change; 1 if there is anything.

    Args:
        run: Run folder.
        test: Part of a test's name, None for all.
    """
    verdicts = _open_verdicts(run, test)
    for verdict in verdicts:
        print(f"{verdict.test}: {describe_move(verdict)}")
        print(render_failure(verdict, update_command=None))
        print()
    if verdicts:
        print(f"accept them: pytest-msprobe accept {run}")
    else:
        print("nothing to accept")
    return FINDING if verdicts else 0


def accept(run: str, *, test: str | None) -> int:
    """Makes the captures of tests that failed, or had none, their goldens.

    Args:
        run: Run folder.
        test: Part of a test's name, None for all.

    Raises:
        GoldenError: Goldens are not written here, or ranks disagree.
    """
    _refuse_ci("accept")
    by_test: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in _open_verdicts(run, test):
        by_test[str(Path(verdict.capture).parent)].append(verdict)
    for verdicts in by_test.values():
        captures = [read_capture(Path(verdict.capture)) for verdict in verdicts]
        disagreement = find_disagreement(captures)
        if disagreement is not None:
            message = f"{verdicts[0].test}: {disagreement.text}"
            raise GoldenError(message, slug="ranks", hint="find out why, run again")
        for verdict, capture in zip(verdicts, captures, strict=True):
            header = capture.header
            folder = Path(verdict.golden).parent
            path = folder / file_name(header.key, header.rank)
            write_bytes(path, golden_bytes(capture, verdict.test, header.key), LOCKS)
            print(f"golden written: {path}")
    if not by_test:
        print("nothing to accept")
    return 0


def _refuse_ci(command: str) -> None:
    if is_ci():
        message = f"{command}: goldens are not changed where CI is set"
        raise GoldenError(message, hint="do it on your own machine, commit the files")


def prune(arguments: Sequence[str], *, config: str | None, is_sure: bool) -> int:
    """Lists goldens of tests that no longer exist, and removes them if told to.

    Args:
        arguments: pytest's, to collect all tests with.
        config: Configuration, None for the one in this folder.
        is_sure: Whether they are removed.

    Raises:
        ConfigError: The tests cannot be collected.
        GoldenError: Goldens are not removed here.
    """
    if is_sure:
        _refuse_ci("prune")
    path = find_config(config)
    settings = read_settings(path)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run(  # noqa: S603 - the user's own tests
        [*command, "--msprobe-config", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        message = f"the tests cannot be collected: {last}"
        raise ConfigError(message, hint="run pytest --collect-only")
    tests = {line.strip() for line in done.stdout.splitlines() if "::" in line}
    goldens = sorted(settings.golden.directory.rglob("*.jsonl"))
    owners = {golden: read_header(golden).test for golden in goldens}
    orphans = {g: test for g, test in owners.items() if test not in tests}
    for golden, test in orphans.items():
        if is_sure:
            remove(golden, LOCKS)
        print(f"golden {'removed' if is_sure else 'of no test'}: {golden} ({test})")
    if not orphans:
        print("every golden is of a test")
    elif not is_sure:
        print("remove them: pytest-msprobe prune --yes")
    return FINDING if orphans and not is_sure else 0
