# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe calibrate`: measures how far clean runs of a test are apart.

The tests are run as they are, then again with something benign changed. What each row
moved by is stored in its golden, and raises the row's limit from then on.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pytest_msprobe.cli.runs import run_pytest, verdicts_of
from pytest_msprobe.compare.judge import Noise, measure_noise
from pytest_msprobe.compare.match import pair_rows
from pytest_msprobe.dump.capture import CaptureFile, read_capture
from pytest_msprobe.golden.guard import is_ci
from pytest_msprobe.golden.key import device_kind
from pytest_msprobe.golden.store import calibrated_bytes, write_bytes
from pytest_msprobe.model.limits import NOISE_MULTIPLE, ROW_METRICS
from pytest_msprobe.model.verdict import Verdict

USAGE_ERROR = 4
VARIABLE = "MSPROBE_CALIBRATION"
RUNS = ("repeat", "threads", "batch", "chunks", "order", "attention")
_SHOWN = 10
_STATE = Path(".msprobe")
_BATCH = 8
_ATTENTION = ("FLASH_ATTN", "TRITON_ATTN")


@dataclass(frozen=True, slots=True)
class Change:
    """What one run changes.

    Attributes:
        name: For people.
        engine: Engine arguments.
        env: Environment variables.
        reverse: Whether tests run in reverse order.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    reverse: bool = False

    @property
    def text(self) -> str:
        """As the run is told."""
        change = {"engine": self.engine, "env": self.env, "reverse": self.reverse}
        return json.dumps(change)


@dataclass(slots=True)
class _Row:
    """What is known of a golden's tensor: its noise, and a name and limits to show."""

    name: str
    noise: dict[str, float]
    limits: dict[str, float]


@dataclass(slots=True)
class _Target:
    """A golden that is being calibrated.

    Attributes:
        verdict: Of the first run.
        golden: The golden.
        capture: The first run's capture.
        rows: What was found, by the golden's tensor.
        runs: Changes with which it was compared.
        logprob: Greatest difference of a log-probability.
        untolerable: Names of rows that differ as no tolerance allows.
    """

    verdict: Verdict
    golden: CaptureFile
    capture: CaptureFile
    rows: dict[int, _Row] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    logprob: float = 0.0
    untolerable: set[str] = field(default_factory=set)


def calibrate(arguments: Sequence[str]) -> int:
    """Runs tests several times and stores each row's noise in the goldens.

    Args:
        arguments: `--runs NAME,…` and pytest's arguments.

    Returns:
        0; pytest's exit code where the tests do not pass as they are; 4 for wrong use.
    """
    names, rest, problem = _read(arguments)
    if problem:
        print(f"pytest-msprobe calibrate: {problem}", file=sys.stderr)
        return USAGE_ERROR
    code, run = run_pytest(rest, _STATE)
    if code != 0 or run is None:
        print("pytest-msprobe calibrate: the tests must pass first", file=sys.stderr)
        return code or USAGE_ERROR
    targets = _targets(run)
    for change in changes(names, [target.capture for target in targets.values()]):
        print(f"\ncalibrate: {change.name}", flush=True)
        # A preloaded OpenMP reads its variables before any of our code runs.
        variables = {**change.env, VARIABLE: change.text}
        _, other = run_pytest(rest, _STATE, **variables)
        if other is not None:
            _compare(targets, other, change.name)
    for target in targets.values():
        _write(target)
    if not targets:
        print("pytest-msprobe calibrate: no golden of this key", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _read(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str], str]:
    """Names of the runs, pytest's arguments, and what is wrong."""
    rest = list(arguments)
    names: tuple[str, ...] = RUNS
    if is_ci():
        return names, rest, "goldens are not written where CI is set"
    if any(argument.startswith("--msprobe-update") for argument in rest):
        return names, rest, "--msprobe-update: write the goldens first"
    for place, argument in enumerate(rest):
        if argument.startswith("--runs="):
            names = tuple(argument.partition("=")[2].split(","))
            del rest[place]
            break
    for name in names:
        if name not in RUNS:
            return names, rest, f"--runs: {name!r}: known: {', '.join(RUNS)}"
    return names, rest, ""


def changes(names: Sequence[str], captures: Sequence[CaptureFile]) -> list[Change]:
    """The runs to make.

    Args:
        names: Which kinds.
        captures: Of the first run; they tell threads, prompts and device.
    """
    prompts = [r.prompt_tokens for c in captures for r in c.header.requests]
    provenance = captures[0].header.provenance if captures else {}
    threads = int(provenance.get("threads", 1))
    is_cpu = not captures or device_kind(captures[0].header.key) == "cpu"
    other = str(2 if threads == 1 else threads // 2)
    chunk = max(2, max(prompts, default=4) // 2)
    used = provenance.get("attention", [])
    found = {
        "repeat": [Change("repeat")],
        "threads": [Change(f"threads {other}", env={"OMP_NUM_THREADS": other})],
        "batch": [Change("batch", {"max_num_seqs": _BATCH})],
        "chunks": [
            Change(
                f"chunks of {chunk} tokens",
                {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk},
            )
        ],
        "order": [Change("order", reverse=True)],
        "attention": [
            Change(f"attention {name}", {"attention_backend": name})
            for name in _ATTENTION
            if name not in used
        ],
    }
    if is_cpu:
        found["attention"] = []
    else:
        found["threads"] = []
    return [change for name in names for change in found[name]]


def _targets(run: Path) -> dict[str, _Target]:
    """What the first run judged against goldens of its own key, by place in the run."""
    targets = {}
    for verdict in verdicts_of(run):
        if verdict.mode != "same" or not verdict.is_green:
            print(f"{verdict.test}: its golden is of another key, not calibrated")
            continue
        place = str(Path(verdict.capture).relative_to(run.absolute()))
        golden = read_capture(Path(verdict.golden))
        targets[place] = _Target(verdict, golden, read_capture(Path(verdict.capture)))
    return targets


def _compare(targets: dict[str, _Target], other: Path, change: str) -> None:
    for place, target in targets.items():
        path = other / place
        if not path.is_file():
            print(f"{target.verdict.test}: {change}: nothing was captured")
            continue
        rules = [rule.rule() for rule in target.verdict.rules]
        noise = measure_noise(target.capture, read_capture(path), rules)
        _note(target, noise)
        target.runs.append(change)


def _note(target: _Target, noise: Noise) -> None:
    """Takes the greatest error of each row of the golden."""
    logprob = float(noise.tokens.largest)
    target.logprob = max(target.logprob, logprob)
    pairs = pair_rows(target.golden, target.capture)
    # Rows of the first capture with the golden's tensor that they are judged against.
    tensors = dict(zip(pairs.new.tolist(), pairs.old.tolist(), strict=True))
    names = noise.pairs.golden.names(noise.pairs.old[noise.rows])
    rows = noise.pairs.old[noise.rows].tolist()
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        errors = {metric: float(noise.errors[metric][i]) for metric in ROW_METRICS}
        if not all(map(math.isfinite, errors.values())):
            target.untolerable.add(name)
            continue
        if row not in tensors:
            continue
        line = pairs.golden.lines[int(pairs.golden.tensor[tensors[row]])]
        limits = {metric: float(noise.limits[metric][i]) for metric in ROW_METRICS}
        known = target.rows.setdefault(line.t, _Row(name, errors, limits))
        known.noise = {m: max(known.noise[m], errors[m]) for m in ROW_METRICS}


def _write(target: _Target) -> None:
    """Stores the noise in the golden and says what it is."""
    noise = {
        number: [round_up(row.noise[metric]) for metric in ROW_METRICS]
        for number, row in target.rows.items()
    }
    about = {"runs": target.runs, "logprob": round_up(target.logprob)}
    path = target.golden.path
    assert path is not None
    locks = _STATE / "locks"
    write_bytes(path, calibrated_bytes(target.golden, noise, about), locks)
    print(f"\n{target.verdict.test}: {path}")
    print(f"  {len(target.runs)} runs: {', '.join(target.runs)}")
    print(f"  {len(noise)} of {len(target.golden.tensors)} tensors have noise")
    for number, metric in enumerate(ROW_METRICS):
        greatest = max((values[number] for values in noise.values()), default=0.0)
        print(f"  {metric}: greatest noise {greatest:g}")
    print(f"  logprob: greatest noise {about['logprob']:g}")
    _print_loud(target)


def _print_loud(target: _Target) -> None:
    """Rows whose noise exceeds their rule, and rows that no tolerance helps."""
    loud: dict[str, list[str]] = defaultdict(list)
    for row in target.rows.values():
        for metric in ROW_METRICS:
            if row.noise[metric] > row.limits[metric]:
                text = f"{metric} {row.noise[metric]:.3g} (rule {row.limits[metric]:g})"
                loud[row.name].append(text)
    if loud:
        print(f"  noise above the rule in {len(loud)} rows:")
    for name, texts in list(loud.items())[:_SHOWN]:
        print(f"    {name}: {', '.join(texts)}")
    if target.untolerable:
        count = len(target.untolerable)
        print(
            f"  {count} rows differ between clean runs as no tolerance allows; ignore"
        )
    for name in sorted(target.untolerable)[:_SHOWN]:
        print(f"    {name}")
    print(f"  a row's limit is its rule or {NOISE_MULTIPLE:g} times its noise")


def round_up(value: float) -> float:
    """A number with two digits that is not below the value."""
    if value == 0.0 or not math.isfinite(value):
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    rounded = float(f"{math.ceil(value / unit) * unit:.1e}")
    return rounded if rounded >= value else float(np.nextafter(value, np.inf))
