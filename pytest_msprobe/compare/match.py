# SPDX-License-Identifier: Apache-2.0
"""Pairs the rows of a candidate with those of a golden and lays them out as columns."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pytest_msprobe.dump.capture import CallLine, CaptureFile, TensorLine
from pytest_msprobe.model.dtypes import BY_CODE, is_sketched
from pytest_msprobe.model.names import MODULE_PREFIX, parse_call_name
from pytest_msprobe.model.verdict import RowId
from pytest_msprobe.statistics.sketch import fold, unpack

Key = tuple[str, str, str, int]
_F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class RowSet:
    """The rows of one capture.

    Attributes:
        tensors: Numbers by key (place, slot, segment, step or -1).
        rows: Identity by key, in execution order.
    """

    tensors: dict[Key, TensorLine] = field(default_factory=dict)
    rows: dict[Key, RowId] = field(default_factory=dict)


def key_of(place: str, slot: str, tensor: TensorLine, step: int) -> Key:
    """Key of a row: tensors of neither class need their step as well."""
    return (place, slot, tensor.g, -1 if tensor.g else step)


def parents_of(calls: list[tuple[int, CallLine]]) -> list[str]:
    """Name of the recorded module around each call, empty at the top.

    Calls stand in the order in which they ended, so a call's parent is the first one
    behind it that is one level higher.
    """
    parents = [""] * len(calls)
    around: dict[int, str] = {}
    for index in range(len(calls) - 1, -1, -1):
        call = calls[index][1]
        around = {level: name for level, name in around.items() if level < call.l}
        parents[index] = around.get(call.l - 1, "")
        around[call.l] = call.c
    return parents


def places_of(calls: list[tuple[int, CallLine]]) -> list[str]:
    """What identifies each call within its step.

    A module's is its name. APIs are numbered over the whole step in their names, so
    that one call more would shift all later ones; they are identified by the module
    around them and their number within it.
    """
    places: list[str] = []
    counts: Counter[tuple[int, str]] = Counter()
    for (step, call), parent in zip(calls, parents_of(calls), strict=True):
        name = parse_call_name(call.c)
        if name is None or name.is_module:
            places.append(call.c)
            continue
        text = f"{parent}>{name.prefix}.{name.path}"
        number = counts[step, text]
        counts[step, text] += 1
        places.append(f"{text}.{number}")
    return places


def collect_rows(capture: CaptureFile) -> RowSet:
    """All rows of a capture in execution order; the first of equal keys counts."""
    result = RowSet()
    calls = list(capture.calls())
    for (step, call), place in zip(calls, places_of(calls), strict=True):
        for side in (call.i, call.o):
            for slot, ids in side.items():
                for number in ids:
                    tensor = capture.tensors[number]
                    key = key_of(place, slot, tensor, step)
                    if key not in result.tensors:
                        result.tensors[key] = tensor
                        result.rows[key] = RowId(call.c, slot, tensor.g, step)
    return result


@dataclass(slots=True)
class Pairs:
    """Rows that both captures have, as columns.

    Attributes:
        keys: In the candidate's execution order.
        ids: Identity of each row.
        golden: `t` lines of the golden.
        candidate: `t` lines of the candidate.
        is_equal: Whether dtype, shape and checksum are equal.
        missing: Rows of the golden only.
        extra: Rows of the candidate only.
    """

    keys: list[Key]
    ids: list[RowId]
    golden: list[TensorLine]
    candidate: list[TensorLine]
    is_equal: npt.NDArray[np.bool_]
    missing: list[RowId]
    extra: list[RowId]


def pair_rows(golden: CaptureFile, candidate: CaptureFile) -> Pairs:
    """Pairs rows by key."""
    left, right = collect_rows(golden), collect_rows(candidate)
    keys = [key for key in right.tensors if key in left.tensors]
    old = [left.tensors[key] for key in keys]
    new = [right.tensors[key] for key in keys]
    equal = np.fromiter(
        (
            a.c == b.c and a.d == b.d and a.s == b.s
            for a, b in zip(old, new, strict=True)
        ),
        dtype=np.bool_,
        count=len(keys),
    )
    return Pairs(
        keys,
        [right.rows[key] for key in keys],
        old,
        new,
        equal,
        [row for key, row in left.rows.items() if key not in right.tensors],
        [row for key, row in right.rows.items() if key not in left.tensors],
    )


def is_output(row: RowId) -> bool:
    """Whether a row is of an output slot."""
    return row.slot.startswith("output")


def is_module_row(row: RowId) -> bool:
    """Whether a row is of a module call (L0)."""
    return row.call.startswith(MODULE_PREFIX + ".")


@dataclass(slots=True)
class Columns:
    """Numbers of some rows of one capture.

    Attributes:
        count: Elements.
        high: Largest finite element, NaN where there is none.
        low: Smallest.
        total: Sum, NaN for integer types.
        squares: Sum of squares, NaN for integer types.
        nonfinite: (n, 3) counts of NaN, +Inf, -Inf.
        is_float: Whether sums and a sketch exist.
    """

    count: _F64
    high: _F64
    low: _F64
    total: _F64
    squares: _F64
    nonfinite: npt.NDArray[np.int64]
    is_float: npt.NDArray[np.bool_]


def columns_of(tensors: list[TensorLine]) -> Columns:
    """Numbers of `t` lines as columns."""
    size = len(tensors)
    values = np.full((size, 4), np.nan)
    nonfinite = np.zeros((size, 3), dtype=np.int64)
    count = np.ones(size)
    is_float = np.zeros(size, dtype=np.bool_)
    for index, tensor in enumerate(tensors):
        for place, value in enumerate(tensor.v):
            if value is not None:
                values[index, place] = value
        if tensor.x:
            nonfinite[index] = tensor.x
        count[index] = np.prod(tensor.s, dtype=np.float64) if tensor.s else 1.0
        element = BY_CODE.get(tensor.d)
        is_float[index] = element is not None and is_sketched(element.name)
    return Columns(
        count,
        values[:, 0],
        values[:, 1],
        values[:, 2],
        values[:, 3],
        nonfinite,
        is_float,
    )


def _single_distance(old: TensorLine, new: TensorLine) -> float:
    """Distance of two single elements, which have no sketch; NaN for anything else."""
    values = [line.v[0] for line in (old, new) if len(line.v) == 4]  # noqa: PLR2004
    if old.s != new.s or np.prod(old.s) != 1 or len(values) != 2:  # noqa: PLR2004
        return float("nan")
    a, b = values
    if a is None or b is None:
        return 0.0 if a is b else float("nan")
    return abs(float(a) - float(b))


def sketch_distances(
    golden: list[TensorLine], candidate: list[TensorLine]
) -> tuple[_F64, _F64]:
    """Distance and cosine of pairs of sketches.

    Where one side has 64 buckets and the other 32, the former is folded.

    Returns:
        (n,) estimated L2 distance and (n,) cosine; NaN where a side has no sketch.
    """
    distance = np.full(len(golden), np.nan)
    cosine = np.full(len(golden), np.nan)
    for index, (old, new) in enumerate(zip(golden, candidate, strict=True)):
        if not old.q or not new.q:
            distance[index] = _single_distance(old, new)
            continue
        a, b = unpack(old.q, old.a), unpack(new.q, new.a)
        if a.size > b.size:
            a = fold(a)
        elif b.size > a.size:
            b = fold(b)
        distance[index] = np.linalg.norm(a - b)
        length = np.linalg.norm(a) * np.linalg.norm(b)
        if length > 0:
            cosine[index] = float(a @ b) / length
    return distance, cosine
