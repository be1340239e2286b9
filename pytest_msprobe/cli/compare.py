# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe compare A B`: captures, goldens and dumps, without an engine."""

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pytest_msprobe.cli.inspect import FINDING, print_verdict
from pytest_msprobe.cli.sources import find_ranks, read_pairs
from pytest_msprobe.compare.elements import measure_files
from pytest_msprobe.compare.judge import Judgement, judge
from pytest_msprobe.compare.mapping import (
    by_layers,
    read_mapping,
    renamed,
    row_renames,
    unknown_layers,
    without_class,
)
from pytest_msprobe.compare.match import pair_rows
from pytest_msprobe.compare.msprobe_table import Line, table
from pytest_msprobe.compare.tolerance import unmatched_error
from pytest_msprobe.config.settings import read_settings
from pytest_msprobe.dump.capture import CaptureFile
from pytest_msprobe.model.limits import Rule
from pytest_msprobe.model.verdict import Verdict

if TYPE_CHECKING:
    from pytest_msprobe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """What `compare` was asked for.

    Attributes:
        is_json: Print verdicts as JSON, one a line.
        table: File for msProbe's metrics, or None.
        config: Configuration whose tolerances hold, or None.
        data_mapping: File with rows of the candidate and of the golden, or None.
        layer_mapping: File with modules (`path.Class`) of both, or None.
        is_fuzzy: Pair modules without regard to their class.
    """

    is_json: bool = False
    table: str | None = None
    config: str | None = None
    data_mapping: str | None = None
    layer_mapping: str | None = None
    is_fuzzy: bool = False


def compare(golden: str, candidate: str, options: Options) -> int:
    """Judges one side against the other, rank by rank.

    Args:
        golden: A capture, a golden, a dump.json or a folder with some.
        candidate: Likewise.
        options: How.

    Returns:
        0, or 1 where a verdict is not green.

    Raises:
        ConfigError: A mapping names a module, or a row, that no pair has.
    """
    old, new = find_ranks(Path(golden)), find_ranks(Path(candidate))
    rules = read_settings(Path(options.config)).rules if options.config else ()
    code = 0
    layers = read_mapping(Path(options.layer_mapping)) if options.layer_mapping else {}
    unknown: dict[str, ConfigError] | None = None
    lines: list[Line] = []
    unused = {id(rule): rule for rule in rules}
    names: list[str] = []
    for place in [*old, *(place for place in new if place not in old)]:
        if place not in old or place not in new:
            side = "golden" if place in old else "candidate"
            print(f"{place or '.'}: only in the {side}", file=sys.stderr)
            code = FINDING
            continue
        for pair in read_pairs(old[place], new[place]):
            missed = unknown_layers(layers, *pair)
            unknown = {
                k: e for k, e in missed.items() if unknown is None or k in unknown
            }
            judgement, rows = _judge(*pair, rules, options, layers)
            lines += rows
            code = max(code, _print(judgement.verdict, is_json=options.is_json))
            left = {id(rule) for rule in judgement.unmatched}
            unused = {key: rule for key, rule in unused.items() if key in left}
            names = list(judgement.names) if unused else names
    for error in (unknown or {}).values():
        raise error
    for rule in unused.values():
        print(f"warning: {unmatched_error(rule, names)}", file=sys.stderr)
    if options.table is not None:
        _write(Path(options.table), lines)
    return code


def _judge(
    golden: CaptureFile,
    candidate: CaptureFile,
    rules: tuple[Rule, ...],
    options: Options,
    layers: dict[str, str],
) -> tuple[Judgement, list[Line]]:
    if layers:
        renamed(candidate, by_layers(layers))
    if options.is_fuzzy:
        renamed(golden, without_class)
        renamed(candidate, without_class)
    renames = None
    if options.data_mapping is not None:
        mapping = read_mapping(Path(options.data_mapping))
        renames = row_renames(mapping, golden, candidate)
    measure = None
    if golden.files and candidate.files:
        measure = partial(measure_files, golden, candidate)
    judgement = judge(golden, candidate, rules, renames=renames, measure=measure)
    rows: list[Line] = []
    if options.table is not None:
        rows = table(pair_rows(golden, candidate, renames), golden, candidate)
    return judgement, rows


def _print(verdict: Verdict, *, is_json: bool) -> int:
    if not is_json:
        return print_verdict(verdict, None)
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    return 0 if verdict.is_green else FINDING


def _write(path: Path, lines: list[Line]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(lines)
