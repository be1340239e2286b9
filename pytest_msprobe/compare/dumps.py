# SPDX-License-Identifier: Apache-2.0
"""Judges one dump against another, whichever tool wrote them.

A dump holds four statistics of a tensor, so this sees less than a comparison of
captures, which have sketches; it needs nothing but the dump's files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_msprobe.compare.tolerance import default_limits
from pytest_msprobe.dump import layout
from pytest_msprobe.dump.reader import read_dump
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.limits import KeyMode

# msProbe rounds Mean and Norm to the tensor's type; half a unit of its last place.
_ROUNDING = {"torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11}
_STATISTICS = ("Max", "Min", "Mean", "Norm")
_METRICS = {"Max": "max", "Min": "min", "Mean": "mean", "Norm": "norm"}


@dataclass(frozen=True, slots=True)
class DumpFinding:
    """A row of the golden dump that the other one does not have within the limits.

    Attributes:
        step: Name of the step's folder.
        rank: Name of the rank's folder.
        row: Name of the record and place in it.
        what: What differs: missing, dtype, shape, value, md5 or a statistic.
        golden: Value of the golden.
        actual: Value of the other dump.
        error: Scaled error of a statistic, None for everything else.
        limit: Its limit.
    """

    step: str
    rank: str
    row: str
    what: str
    golden: Any = None
    actual: Any = None
    error: float | None = None
    limit: float | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        where = f"{self.step}/{self.rank} {self.row}: {self.what}"
        if self.error is not None:
            where += f" error {self.error:.2e} above {self.limit:.2e}"
        return f"{where} (golden {self.golden!r}, here {self.actual!r})"


@dataclass(slots=True)
class DumpVerdict:
    """The judgement of one dump against another.

    Attributes:
        rows: Rows of the golden that were judged.
        extra: Records that only the other dump has; they do not count.
        findings: What differs, in the golden's order.
    """

    rows: int = 0
    extra: int = 0
    findings: list[DumpFinding] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        """Whether rows were judged and none of them differs."""
        return self.rows > 0 and not self.findings


def judge_dumps(golden: Path, actual: Path, *, mode: KeyMode = "same") -> DumpVerdict:
    """Judges a dump.

    Args:
        golden: Folder of a dump, of one of its steps or ranks, or a dump.json.
        actual: The same kind of path of the other dump.
        mode: Whether both were made on hardware with the same numerics.

    Raises:
        DumpFormatError: A path holds no dump, or a file is not readable.
    """
    verdict = DumpVerdict()
    left, right = _files_of(golden), _files_of(actual)
    for place, path in left.items():
        other = right.get(place)
        if other is None:
            verdict.findings.append(DumpFinding(*place, "dump.json", "missing"))
            continue
        _judge_file(verdict, place, path, other, mode)
    return verdict


def _files_of(path: Path) -> dict[tuple[str, str], Path]:
    """Every dump.json at or below a path by step and rank; ranks without one: -."""
    if path.is_file():
        return {("-", "-"): path}
    if (path / layout.DUMP).is_file():
        return {("-", "-"): path / layout.DUMP}
    steps = {f"step{n}": folder for n, folder in layout.steps_of(path).items()}
    found: dict[tuple[str, str], Path] = {}
    for step, folder in (steps or {"-": path}).items():
        ranks = layout.ranks_of(folder) if folder.is_dir() else {}
        for rank, rank_folder in ranks.items():
            name = "-" if len(ranks) == 1 else rank
            found[step, name] = rank_folder / layout.DUMP
    if not found:
        message = f"{path}: no dump.json in it; expected the folder of a dump"
        raise DumpFormatError(message, slug="dump-missing")
    return found


def _judge_file(
    verdict: DumpVerdict,
    place: tuple[str, str],
    golden: Path,
    actual: Path,
    mode: KeyMode,
) -> None:
    left, right = read_dump(golden).data, read_dump(actual).data
    verdict.extra += sum(name not in left for name in right)
    for name, record in left.items():
        if name not in right:
            verdict.findings.append(DumpFinding(*place, name, "missing"))
            continue
        leaves = dict(_leaves(right[name], name))
        for row, value in _leaves(record, name):
            verdict.rows += 1
            if row not in leaves:
                verdict.findings.append(DumpFinding(*place, row, "missing"))
                continue
            verdict.findings.extend(_compare(place, row, value, leaves[row], mode))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of a record with their names."""
    if isinstance(value, dict) and "type" not in value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    else:
        yield name, value


def _compare(
    place: tuple[str, str], row: str, golden: Any, actual: Any, mode: KeyMode
) -> Iterator[DumpFinding]:
    """What differs between two values of one row, the first thing only."""
    if not _is_tensor(golden) or not _is_tensor(actual):
        if golden != actual and not (_is_nan(golden) and _is_nan(actual)):
            yield DumpFinding(*place, row, "value", golden, actual)
        return
    for key in ("dtype", "shape"):
        if golden.get(key) != actual.get(key):
            yield DumpFinding(*place, row, key, golden.get(key), actual.get(key))
            return
    checksums = golden.get("md5"), actual.get("md5")
    if checksums[0] is not None and checksums[0] == checksums[1]:
        return
    if "Max" not in golden or "Max" not in actual:
        if None not in checksums:
            yield DumpFinding(*place, row, "md5", *checksums)
        return
    for key in _STATISTICS:
        finding = _compare_statistic(place, row, key, golden, actual, mode)
        if finding is not None:
            yield finding
            return


def _compare_statistic(  # noqa: PLR0911 - one return a verdict
    place: tuple[str, str],
    row: str,
    key: str,
    golden: dict[str, Any],
    actual: dict[str, Any],
    mode: KeyMode,
) -> DumpFinding | None:
    left, right = golden.get(key), actual.get(key)
    if left is None or right is None or left == right:
        return None  # one of the tools has no such number for this type
    if not math.isfinite(left) or not math.isfinite(right):
        if _is_nan(left) and _is_nan(right):
            return None
        # With a NaN or infinity inside, tools differ in the sums; extremes tell.
        # msProbe's also overflow in float16.
        known = {golden.get(name) for name in ("Max", "Min")}
        is_lost = golden.get("dtype") == "torch.float16" or any(
            not math.isfinite(value or 0) for value in known
        )
        if key in ("Mean", "Norm") and is_lost:
            return None
        return DumpFinding(*place, row, key, left, right)
    dtype = str(golden.get("dtype"))
    if not dtype.startswith(("torch.float", "torch.bfloat", "torch.complex")):
        return DumpFinding(*place, row, key, left, right)
    limit = default_limits(mode, dtype.removeprefix("torch."))[_METRICS[key]]
    if key in ("Mean", "Norm"):
        limit += _ROUNDING.get(dtype, 0.0)
    error = abs(left - right) / _scale(key, golden)
    if error <= limit:
        return None
    return DumpFinding(*place, row, key, left, right, error, limit)


def _scale(key: str, golden: dict[str, Any]) -> float:
    """What an error is relative to; never zero."""
    if key == "Norm":
        scale = abs(golden["Norm"])
    elif key == "Mean" and golden.get("Norm") is not None:
        count = math.prod(golden.get("shape") or [1])
        scale = abs(golden["Norm"]) / math.sqrt(max(count, 1))
    else:
        scale = max(abs(golden["Max"]), abs(golden["Min"]))
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "dtype" in value and "shape" in value


def _is_nan(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.get("value")
    return isinstance(value, float) and math.isnan(value)
