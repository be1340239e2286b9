# SPDX-License-Identifier: Apache-2.0
"""Commands that read saved files: no engine, no torch."""

import sys
from collections import Counter
from pathlib import Path

import msgspec

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.dump.capture import CaptureFile, StepLine, read_capture
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.names import display_name
from pytest_msprobe.report.record import read_verdict
from pytest_msprobe.report.terminal import render_failure, render_green

FINDING = 1


def check(run: str) -> int:
    """Judges the captures of a saved run against their goldens again."""
    paths = sorted(Path(run).rglob("verdict*.json"))
    if not paths:
        raise DumpFormatError(f"{run}: no verdict.json below it; expected a run folder")
    code = 0
    for path in paths:
        old = read_verdict(path)
        if old.status == "missing":
            print(f"{old.test}: missing: no golden")
            code = FINDING
            continue
        golden, candidate = (
            read_capture(Path(old.golden)),
            read_capture(Path(old.capture)),
        )
        code = max(code, _print_verdict(golden, candidate))
    return code


def compare(golden: str, candidate: str, *, as_json: bool) -> int:
    """Judges one capture file against another."""
    old, new = read_capture(Path(golden)), read_capture(Path(candidate))
    if as_json:
        verdict = judge(old, new).verdict
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        return 0 if verdict.is_green else FINDING
    return _print_verdict(old, new)


def _print_verdict(golden: CaptureFile, candidate: CaptureFile) -> int:
    verdict = judge(golden, candidate).verdict
    if verdict.is_green:
        print(render_green(verdict))
        return 0
    print(render_failure(verdict, update_command="pytest --msprobe-update=failing"))
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
