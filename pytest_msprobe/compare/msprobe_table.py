# SPDX-License-Identifier: Apache-2.0
"""The metrics of msProbe's `compare` under their names, one line a row.

They are shown beside a verdict and decide nothing: relative errors of statistics whose
golden is near 0 blow up, which is why rows are judged by other metrics.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from pytest_msprobe.compare.elements import ElementErrors, compare_tensors, threads
from pytest_msprobe.compare.mapping import msprobe_row
from pytest_msprobe.compare.match import Pairs
from pytest_msprobe.dump.capture import CaptureFile, TensorLine
from pytest_msprobe.dump.pt import read_tensor
from pytest_msprobe.model.dtypes import BY_CODE
from pytest_msprobe.model.verdict import RowId

Mode = Literal["statistics", "tensor", "md5"]
Line = dict[str, Any]
_STATISTICS = ("Max", "Min", "Mean", "Norm")
_DIFFERENCES = ("Max diff", "Min diff", "Mean diff", "L2norm diff")
_RELATIVE = ("MaxRelativeErr", "MinRelativeErr", "MeanRelativeErr", "NormRelativeErr")
_SHOWN = ("max", "min", "mean", "l2norm")
_THOUSANDTH = "One Thousandth Err Ratio"
_TENSOR = (
    "Cosine",
    "EucDist",
    "MaxAbsErr",
    "MaxRelativeErr",
    _THOUSANDTH,
    "Five Thousandths Err Ratio",
)
_NO_RULES = {
    *("empty", "empty_like", "numpy", "to", "__setitem__", "empty_with_format"),
    *("new_empty", "new_empty_strided", "empty_strided"),
}
_RANKS = ("pass", "warning", "error")
_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDED = 0.9999


def mode_of(golden: CaptureFile, candidate: CaptureFile) -> Mode:
    """What the values of both sides allow to compare."""
    if golden.files and candidate.files:
        return "tensor"
    sides = (golden, candidate)
    if all(any("md5" in v for v in side.values.values()) for side in sides):
        return "md5"
    return "statistics"


def table(pairs: Pairs, golden: CaptureFile, candidate: CaptureFile) -> list[Line]:
    """A line for each row of the candidate, in its order.

    Args:
        pairs: Which rows belong together.
        golden: Where the values of the golden stand.
        candidate: Likewise.
    """
    mode = mode_of(golden, candidate)
    partners = {int(b): int(a) for a, b in zip(pairs.old, pairs.new, strict=True)}
    sides = pairs.golden, pairs.candidate
    old_ids, ids = (side.row_ids(np.arange(len(side.key))) for side in sides)
    lines: list[Line] = []
    with ThreadPoolExecutor(threads()) as pool:
        for number, row in enumerate(ids):
            new = sides[1].lines[sides[1].tensor[number]]
            partner = partners.get(number)
            old = None
            if partner is not None:
                old = sides[0].lines[sides[0].tensor[partner]]
            values = _value(candidate, new), _value(golden, old)
            bench = "N/A" if partner is None else _name(old_ids[partner])
            line: Line = {"NPU Name": _name(row), "Bench Name": bench}
            line |= _common(*values)
            if mode == "md5":
                line["NPU MD5"], line["BENCH MD5"] = (_md5(value) for value in values)
            elif mode == "statistics":
                line |= _statistics(*values)
            else:
                first = golden.files.get(old.t) if old is not None else None
                line |= _tensor((first, candidate.files.get(new.t)), values, pool)
            line |= _shown(*values)
            is_output = row.slot.startswith("output")
            line |= {"Step": row.step, "call": row.call, "is_output": is_output}
            line["is_scalar"] = "shape" not in values[0]
            lines.append(line)
    _judge(lines, mode)
    return lines


def _name(row: RowId) -> str:
    name = msprobe_row(row.call, row.slot)
    return f"{name}@{row.segment}" if row.segment else name


def _value(capture: CaptureFile, line: TensorLine | None) -> Line:
    """A value as it stands in a dump, made from a row's numbers where there is none."""
    if line is None:
        return {}
    known = capture.values.get(line.t)
    if known is not None:
        return known
    dtype = f"torch.{BY_CODE[line.d].name}" if line.d in BY_CODE else line.d
    count = math.prod(line.s)
    value: Line = {"type": "torch.Tensor", "dtype": dtype, "shape": line.s}
    value |= {"Max": line.v[0], "Min": line.v[1], "Mean": None, "Norm": None}
    if line.x:
        return value | dict.fromkeys(_STATISTICS, math.nan)
    if len(line.v) > 2 and count:  # noqa: PLR2004 - with sums
        value["Mean"] = float(line.v[2] or 0.0) / count
        value["Norm"] = math.sqrt(float(line.v[3] or 0.0))
    return value


def _numbers(value: Line) -> list[Any]:
    """The four statistics; of a value that is no tensor, itself four times."""
    if not value:
        return ["N/A"] * 4
    if "shape" in value:
        return [value.get(name) for name in _STATISTICS]
    return [value.get("value")] * 4


def _common(new: Line, old: Line) -> Line:
    line: Line = {}
    sides = (("NPU", new), ("Bench", old))
    for side, value in sides:
        dtype = f"<class '{value.get('type')}'>" if value else "N/A"
        line[f"{side} Dtype"] = value.get("dtype", dtype)
    for side, value in sides:
        line[f"{side} Tensor Shape"] = value.get("shape", []) if value else "N/A"
    for side, value in sides:
        line[f"{side} Requires_grad"] = value.get("requires_grad", "N/A")
    return line


def _shown(new: Line, old: Line) -> Line:
    line: Line = {}
    for side, value in (("NPU", new), ("Bench", old)):
        names = (f"{side} {name}" for name in _SHOWN)
        line |= dict(zip(names, _numbers(value), strict=True))
    grads = new.get("requires_grad"), old.get("requires_grad")
    line["Requires_grad Consistent"] = grads[0] == grads[1] if old else "N/A"
    return line


def _md5(value: Line) -> Any:
    if not value:
        return "N/A"
    return value.get("md5") if "shape" in value else str(value.get("value"))


def _statistics(new: Line, old: Line) -> Line:
    line: Line = {}
    pairs = zip(_numbers(new), _numbers(old), strict=True)
    for absolute, relative, (a, b) in zip(_DIFFERENCES, _RELATIVE, pairs, strict=True):
        line[absolute], line[relative] = _difference(a, b)
    return {name: line[name] for name in (*_DIFFERENCES, *_RELATIVE)}


def _difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Absolute difference, and the relative one in per cent as text."""
    if str(a) == str(b) != "N/A":
        return 0, "0"
    if isinstance(a, int | float) and isinstance(b, int | float):
        special = _special_difference(a, b)
        if special:
            return special, special
        return a - b, f"{abs((a - b) / b) * 100}%" if b else "inf"
    text = "N/A" if "N/A" in (a, b) else "Diff"
    return text, text


def _special_difference(a: float, b: float) -> str:
    """Text for NaN and infinities, empty for finite numbers."""
    if math.isnan(a) or math.isnan(b):
        return "Nan"
    if math.isinf(a):
        return "inf" if a > 0 else "-inf"
    if math.isinf(b):
        return "-inf" if b > 0 else "inf"
    return ""


def _tensor(
    files: tuple[Any, Any], values: tuple[Line, Line], pool: ThreadPoolExecutor
) -> Line:
    new, old = values
    if not files[0] or not files[1]:
        return dict.fromkeys(_TENSOR, "unsupported")
    if new.get("shape") != old.get("shape"):
        return dict.fromkeys(_TENSOR, "shape unmatched")
    tensors = [read_tensor(path) for path in files]
    errors = compare_tensors(tensors[0], tensors[1], pool, is_full=True)
    if errors is None:
        return dict.fromkeys(_TENSOR, "unsupported")
    if math.isinf(errors.largest):
        return dict.fromkeys(_TENSOR, "N/A")
    metrics = (
        _cosine(errors, math.prod(new["shape"])),
        math.sqrt(errors.squared) if new["shape"] else "unsupported",
        errors.largest,
        errors.relative,
        *errors.shares,
    )
    return dict(zip(_TENSOR, metrics, strict=True))


def _cosine(errors: ElementErrors, count: int) -> Any:
    if count == 1:
        return "unsupported"
    norms = [math.sqrt(squares) for squares in errors.squares]
    is_zero = [norm <= _EPSILON for norm in norms]
    if any(is_zero):
        return 1.0 if all(is_zero) else "Nan"
    cosine = errors.dot / (norms[0] * norms[1])
    return round(cosine, 6 if cosine > _ROUNDED else 12)


def _judge(lines: list[Line], mode: Mode) -> None:
    """Fills Result and Err_message as msProbe's rules have it."""
    records: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        line["Result"], line["Err_message"] = "pass", []
        records[line["Step"], line["call"]].append(line)
    for (_, call), members in records.items():
        parts = call.split(".")
        if len(parts) > 1 and parts[1] in _NO_RULES:
            continue
        if mode == "md5":
            _judge_md5(members)
            continue
        for line in members:
            if line["Bench Name"] != "N/A":
                _judge_row(line)
        _judge_statistics(members) if mode == "statistics" else _judge_tensor(members)
    for line in lines:
        line["Err_message"] = json.dumps(line["Err_message"])
        for column in ("call", "is_output", "is_scalar"):
            del line[column]


def _note(line: Line, result: str, text: str) -> None:
    line["Err_message"].append(text)
    line["Result"] = max(line["Result"], result, key=_RANKS.index)


def _judge_md5(members: list[Line]) -> None:
    for line in members:
        sides = line["NPU MD5"], line["BENCH MD5"]
        if "N/A" in sides or None in sides:
            _note(line, "warning", "a checksum is missing on one side")
        elif sides[0] != sides[1]:
            _note(line, "error", "checksums differ")


def _is_special(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _judge_row(line: Line) -> None:
    """Rules of one row."""
    here, there = (
        any(_is_special(line[f"{side} {name}"]) for name in ("max", "min"))
        for side in ("NPU", "Bench")
    )
    if here and not there:
        _note(line, "error", "maximum or minimum is NaN or infinite here only")
    if line["Requires_grad Consistent"] is False:
        _note(line, "error", "requires_grad differs")
    if (
        line["is_scalar"]
        and not line["is_output"]
        and line["NPU max"] != line["Bench max"]
    ):
        _note(line, "error", "the value of an argument differs")
    fused = any(text in line["Bench Name"] for text in ("qkv", "gate_up"))
    if line["NPU Dtype"] != line["Bench Dtype"] and not fused:
        _note(line, "error", "dtypes differ")
    if line["NPU Tensor Shape"] != line["Bench Tensor Shape"]:
        _note(line, "error", "shapes differ")


def _numbers_of(lines: list[Line], name: str) -> Iterator[float]:
    """Numbers in a column; a golden of 0 counts as infinite, texts are left out."""
    for line in lines:
        value = line[name]
        if isinstance(value, str):
            if name.endswith("RelativeErr") and value.endswith("%"):
                yield float(value[:-1])
            elif value in ("inf", "0"):
                yield float(value)
        elif value is not None:
            yield float(value)


def _parts(members: list[Line]) -> tuple[list[Line], list[Line]]:
    outputs = [line for line in members if line["is_output"]]
    return [line for line in members if not line["is_output"]], outputs


def _judge_statistics(members: list[Line]) -> None:
    name = _RELATIVE[3]
    inputs, outputs = _parts(members)
    before = max(_numbers_of(inputs, name), default=math.nan)
    if not outputs or math.isnan(before):
        return
    if before < 10:  # noqa: PLR2004 - per cent
        for line in outputs:
            if max(_numbers_of([line], name), default=0.0) > 50:  # noqa: PLR2004
                _note(line, "error", "norm: inputs below 10 %, output above 50 %")
    after = max(_numbers_of(outputs, name), default=0.0)
    is_large = after / before > 10 if before else after > 10  # noqa: PLR2004
    if is_large:
        _note(
            outputs[0], "warning", "norm: error of outputs above 10 times the inputs'"
        )


def _judge_tensor(members: list[Line]) -> None:
    inputs, outputs = _parts(members)

    def least(lines: list[Line], name: str) -> float:
        return min(_numbers_of(lines, name), default=math.nan)

    checks: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
        ("error", _THOUSANDTH, lambda a, b: a > 0.9 and b < 0.1),  # noqa: PLR2004
        ("warning", "Cosine", lambda a, b: a > 0.9 and a - b > 0.1),  # noqa: PLR2004
    )
    for result, name, is_bad in checks:
        if outputs and is_bad(least(inputs, name), least(outputs, name)):
            _note(outputs[0], result, f"{name}: good in the inputs, bad in the outputs")
