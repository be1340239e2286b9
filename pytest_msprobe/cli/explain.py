# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe explain`: what decides a test or a row, without an engine."""

import dataclasses
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pytest_msprobe.compare.errors import FEW, usual_sizes
from pytest_msprobe.compare.match import row_names, rows_of
from pytest_msprobe.compare.tolerance import (
    DEFAULT,
    default_limits,
    least_limits,
    matching,
    resolve_limits,
    unmatched_error,
)
from pytest_msprobe.config.settings import Settings, read_settings
from pytest_msprobe.config.toml import has_table
from pytest_msprobe.dump.call_table import call_columns
from pytest_msprobe.dump.capture import (
    CaptureFile,
    TensorLine,
    read_capture,
    read_header,
)
from pytest_msprobe.dump.columns import table_columns
from pytest_msprobe.errors import ConfigError, DumpFormatError
from pytest_msprobe.model.limits import (
    LIMIT_NAMES,
    NOISE_MULTIPLE,
    ROW_METRICS,
    KeyMode,
    Rule,
)
from pytest_msprobe.model.names import CHOICE_CLASS, MODULE_PREFIX
from pytest_msprobe.model.verdict import RowId
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR

_MODES: tuple[KeyMode, KeyMode] = ("same", "cross")
_EXTREMES = 2  # numbers of integer types: maximum and minimum
_SHOWN_ROWS = 5
_SHOWN_COMMITS = 5
_CONFIGS = ("msprobe.yaml", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class _Golden:
    """A golden and the test that it is of."""

    path: Path
    test: str


def find_config(given: str | None) -> Path:
    """The configuration: the one given, else the one in this folder.

    Raises:
        ConfigError: There is none.
    """
    if given is not None:
        return Path(given)
    for name in _CONFIGS:
        path = Path(name)
        if path.is_file() and (path.suffix != ".toml" or has_table(path)):
            return path
    message = "no msprobe.yaml and no pyproject.toml with [tool.msprobe] here"
    raise ConfigError(message, hint="name the file: --msprobe-config FILE")


def explain(what: str, row: str | None, *, config: str | None) -> int:
    """Prints key, provenance, history and rules of a test's goldens, or of a row.

    Args:
        what: Node id of a test, part of one, or the name of a row.
        row: Glob over rows, or part of a name, or None for the test alone.
        config: Configuration, None for the one in this folder.

    Raises:
        DumpFormatError: No golden is of such a test or has such a row.
    """
    settings = read_settings(find_config(config))
    goldens = list(_goldens(settings.golden.directory))
    chosen = [golden for golden in goldens if what in golden.test]
    if not chosen and row is None:
        chosen, row = goldens, what
    found = False
    for golden in chosen:
        capture = read_capture(golden.path)
        if row is None:
            found = True
            names = row_names(capture)
            _print_golden(golden, capture, names)
            _print_rules(settings.rules, capture, names)
        else:
            found |= _print_rows(golden, capture, settings, row)
    if not found:
        raise _nothing(what, row, chosen, goldens)
    return 0


def _nothing(
    what: str, row: str | None, chosen: Sequence[_Golden], goldens: Sequence[_Golden]
) -> Exception:
    if row is None or row == what:
        tests = sorted({golden.test for golden in goldens})
        message = f"{what}: no golden is of such a test or has such a row"
        shown = ", ".join(tests[:_SHOWN_ROWS]) or "none"
        hint = f"tests with goldens: {shown}"
        if goldens:
            near = unmatched_error(
                Rule(what, what), row_names(read_capture(goldens[0].path))
            )
            hint += f"; {near.hint}"
        return DumpFormatError(message, hint=hint)
    return unmatched_error(Rule(what, row), row_names(read_capture(chosen[0].path)))


def _goldens(directory: Path) -> Iterator[_Golden]:
    for path in sorted(directory.rglob("*.jsonl")):
        yield _Golden(path, read_header(path).test)


def _print_golden(golden: _Golden, capture: CaptureFile, names: Sequence[str]) -> None:
    header = capture.header
    print(f"{golden.test}")
    print(f"golden: {golden.path}, format {header.msprobe}")
    print("must be equal in a candidate:")
    _print_mapping(header.signature)
    _print_origin(golden, capture)
    print(f"rows: {len(names)}")
    for request in header.requests:
        print(f"request {request.label}: generated {request.tokens}")
    if header.noise:
        noisy = int(table_columns(capture.tensors).noise.any(axis=1).sum())
        runs = ", ".join(header.noise.get("runs", []))
        print(f"calibrated: {runs}; {noisy} tensors with noise")
    else:
        print("calibrated: no")


def _print_origin(golden: _Golden, capture: CaptureFile) -> None:
    """Key, provenance and history of a golden."""
    header = capture.header
    print(f"numerics key: {header.key}, rank {header.rank} of {header.world}")
    print("made with:")
    _print_mapping(header.provenance)
    print("history:")
    for line in history(golden.path):
        print(f"  {line}")


def _print_mapping(values: dict[str, object]) -> None:
    for name, value in values.items():
        print(f"  {name}: {value}")


def history(path: Path) -> list[str]:
    """The last commits that touched a file, or why there are none."""
    command = ["git", "log", f"-{_SHOWN_COMMITS}", "--format=%h %as %an: %s", "--"]
    try:
        done = subprocess.run(  # noqa: S603 - git with a path
            [*command, path.name],
            cwd=path.parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ["git is not installed"]
    if done.returncode != 0:
        return ["not in a git repository"]
    return done.stdout.splitlines() or ["not committed"]


def _print_rules(
    rules: Sequence[Rule], capture: CaptureFile, names: Sequence[str]
) -> None:
    print("rules, a later one wins; then those of the test's marker and calls:")
    for mode, key in zip(_MODES, ("same", "another"), strict=True):
        print(f"  default, {key} key: {_shown(_defaults(capture, mode))}")
    for rule in rules:
        count = int(matching(rule, names).sum())
        print(f"  {rule.origin}: {describe_rule(rule)} ({count} rows)")


def describe_rule(rule: Rule) -> str:
    """A rule in one line."""
    parts = [f"rows {rule.rows!r}"]
    if rule.mode is not None:
        parts.append(f"mode {rule.mode}")
    parts += [f"{name} {limit:g}" for name, limit in rule.limits.items()]
    parts += [n for n in ("ignore", "exact", "only") if getattr(rule, n)]
    return ", ".join(parts)


def _print_rows(
    golden: _Golden, capture: CaptureFile, settings: Settings, glob: str
) -> bool:
    """Prints what decides some rows of a golden; False if it has none of them."""
    rows = list(_rows_of(capture, glob))
    for row, line, usual in rows[:_SHOWN_ROWS]:
        print(f"{row.text}")
        print(f"  golden: {golden.path}, step {row.step}")
        print(f"  {line.d} {line.s}, checksum {line.c}")
        print(f"  maximum, minimum, sum, sum of squares: {line.v}")
        for mode in _MODES:
            print(f"  limits where the golden has {mode} key:")
            found = chain(capture, settings.rules, row, line, mode, usual)
            for text in found:
                print(f"    {text}")
    if len(rows) > _SHOWN_ROWS:
        print(f"and {len(rows) - _SHOWN_ROWS} more rows of {golden.path}")
    if rows:
        print(f"{golden.test}")
        _print_origin(golden, capture)
    return bool(rows)


def _rows_of(
    capture: CaptureFile, glob: str
) -> Iterator[tuple[RowId, TensorLine, float]]:
    """Rows that a glob, or a part of their name, names; the last of equal names.

    Yields:
        What it is, its numbers, and the usual size of its slot.
    """
    rule = Rule("", glob if set(glob) & set("*?[") else f"*{glob}*")
    rows = rows_of(capture)
    chosen = np.flatnonzero(matching(rule, rows.names(np.arange(len(rows.key)))))
    ids, places = rows.row_ids(chosen), rows.tensor[chosen].tolist()
    sizes = usual_sizes(rows)[chosen].tolist()
    found = zip(ids, places, sizes, strict=True)
    last = {row.text: (row, place, size) for row, place, size in found}
    for row, place, size in last.values():
        yield row, rows.lines[place], size


def _defaults(
    capture: CaptureFile, mode: KeyMode, *, is_rescheduled: bool = False
) -> dict[str, float]:
    """Default limits of a golden's rows."""
    names = set(call_columns(capture.entries).names)
    return default_limits(
        mode,
        str(capture.header.signature.get("model", {}).get("dtype", "")),
        is_rescheduled=is_rescheduled,
        is_mixture=any(f".{CHOICE_CLASS}." in name.c for name in names),
    )


def _shown(limits: dict[str, float]) -> str:
    return ", ".join(f"{metric} {limits[metric]:g}" for metric in LIMIT_NAMES)


def chain(
    capture: CaptureFile,
    rules: Sequence[Rule],
    row: RowId,
    line: TensorLine,
    mode: KeyMode,
    usual: float = 0.0,
) -> Iterator[str]:
    """The rules that a row's limits come from, in their order, and its noise.

    Args:
        capture: The golden.
        rules: Of the configuration.
        row: The row.
        line: Its numbers.
        mode: Whether the golden has the same key.
        usual: Root mean square of its slot.
    """
    is_output = row.slot.split(".")[0] == "output"
    if mode == "cross" and not (row.call.startswith(MODULE_PREFIX) and is_output):
        yield "not judged: with another key only outputs of modules are"
        return
    own = [r for r in rules if r.mode in (None, mode) and matching(r, [row.text])[0]]
    if len(line.v) == _EXTREMES:
        if f".{CHOICE_CLASS}." in row.call and mode == "cross":
            yield "what depends on another choice is not judged; tokens are"
        else:
            yield "integers must be equal, no tolerance applies"
        own = [rule for rule in own if rule.ignore or rule.only]
        yield from (f"{rule.origin}: {describe_rule(rule)}" for rule in own)
        return
    limits = _defaults(capture, mode)
    yield from _default(DEFAULT, limits, own, line, mode)
    if mode == "same":
        limits = _defaults(capture, "same", is_rescheduled=True)
        origin = f"{DEFAULT}, where it was scheduled differently"
        yield from _default(origin, limits, own, line, mode)
    count = math.prod(line.s)
    own_size = math.sqrt(float(line.v[3] or 0.0) / max(count, 1))
    if count <= FEW and usual > own_size:
        where = "" if mode == "cross" else ", where it was scheduled differently"
        yield f"{_elements(count)}: errors are relative to {usual:g}{where}"
    yield from (f"{rule.origin}: {describe_rule(rule)}" for rule in own)
    if line.a is not None:
        yield f"stored as 16 bits: {STORAGE_FLOOR:g} is added to rel_l2"
    if line.n:
        noise = zip(ROW_METRICS, line.n, strict=True)
        shown = ", ".join(f"{metric} {NOISE_MULTIPLE * n:g}" for metric, n in noise)
        yield f"noise x{NOISE_MULTIPLE:g}, where it is larger: {shown}"


def _default(
    origin: str,
    limits: dict[str, float],
    own: Sequence[Rule],
    line: TensorLine,
    mode: KeyMode,
) -> Iterator[str]:
    """Default limits of a row, and what few elements make of them.

    Args:
        origin: What they are.
        limits: The limits.
        own: Rules that name the row: they set limits that few elements do not widen.
        line: The row's numbers.
        mode: Whether the golden has the same key.
    """
    yield f"{origin}: {_shown(limits)}"
    everywhere = [dataclasses.replace(rule, rows="*") for rule in own]
    resolved = resolve_limits([""], everywhere, limits, mode)
    row, count = np.zeros(1, np.int64), np.array([float(math.prod(line.s))])
    wide = {
        metric: float(least_limits(resolved, metric, row, count)[0])
        for metric in ROW_METRICS
    }
    raised = [m for m in ROW_METRICS if wide[m] > resolved.limits[m][0]]
    if raised:
        shown = ", ".join(f"{metric} {wide[metric]:g}" for metric in raised)
        yield f"{_elements(int(count[0]))}: at least rel_l2 / sqrt(elements): {shown}"


def _elements(count: int) -> str:
    return "of 1 element" if count == 1 else f"of {count} elements"
