# SPDX-License-Identifier: Apache-2.0
"""Turns dump.json files, ours or msProbe's, into a capture that can be judged.

A dump has no sketches and no segments: every tensor is one row, with what its
statistics tell. Where a dump holds no checksums, rows with equal statistics count as
equal.
"""

import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pytest_msprobe.dump import layout
from pytest_msprobe.dump.capture import (
    DUMP,
    FORMAT,
    SKETCHED,
    CallLine,
    CaptureFile,
    Header,
    StepLine,
    TensorLine,
)
from pytest_msprobe.dump.reader import DumpFile, read_construct
from pytest_msprobe.model.dtypes import BY_CODE, element_type, is_sketched
from pytest_msprobe.model.names import parse_call_name

STATISTICS = ("Max", "Min", "Mean", "Norm")
# Parts of a record that a call gave, and what it was given.
_OUTPUTS = ("output",)
_INPUTS = ("input_args", "input_kwargs", "input", "parameters")
_NARROW_FLOATS = ("bfloat16", "float16", "float32", "float64")


def leaves(part: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Slots and values in one part of a record; nulls have none.

    Args:
        part: `input_args`, `output`, …
        value: Its content: lists and objects down to objects with a `type`.
    """
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        yield part, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{part}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(f"{part}.{index}", item)


def record_leaves(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Slots and values of a whole record: inputs, parameters, outputs."""
    for part in (*_INPUTS, *_OUTPUTS):
        if part in record:
            yield from leaves(part, record[part])
    for part, value in record.items():  # gradients of parameters stand by name
        if part not in (*_INPUTS, *_OUTPUTS):
            yield from leaves(part, value)


def is_tensor(leaf: Mapping[str, Any]) -> bool:
    """Whether a value is a tensor or an array, with shape and statistics."""
    return isinstance(leaf.get("shape"), list)


def _digest(value: object) -> str:
    return f"~{zlib.crc32(repr(value).encode()):08x}"


def _float_numbers(
    values: list[Any], count: int
) -> tuple[list[float | int | None], list[int]]:
    """Numbers of a float tensor and its counts of NaN, +Inf and -Inf, at least."""
    high, low, mean, norm = (
        float(v) if isinstance(v, int | float) else None for v in values
    )
    nan = int(any(v is not None and math.isnan(v) for v in (high, low)))
    plus, minus = int(high == math.inf), int(low == -math.inf)
    finite = [
        v if v is not None and math.isfinite(v) else None for v in (high, low, mean)
    ]
    is_whole = norm is not None and math.isfinite(norm)
    squares = norm * norm if is_whole and norm is not None else None
    total = finite[2] * count if finite[2] is not None else None
    numbers: list[float | int | None] = [finite[0], finite[1], total, squares]
    return numbers, [nan, plus, minus] if nan or plus or minus else []


def tensor_line(
    number: int, leaf: Mapping[str, Any], *, has_checksums: bool = True
) -> TensorLine | None:
    """A value of a dump as a row, None where nothing is known of it."""
    if not is_tensor(leaf):
        return _scalar_line(number, leaf)
    dtype = str(leaf.get("dtype", ""))
    kind = element_type(dtype)
    shape = [int(size) for size in leaf["shape"]]
    values = [leaf.get(name) for name in STATISTICS]
    checksum = leaf.get("md5") if has_checksums else None
    if all(value is None for value in values) and checksum is None:
        return None
    text = str(checksum) if checksum is not None else _digest(values)
    numbers: list[float | int | None]
    counts: list[int] = []
    if is_sketched(dtype):
        numbers, counts = _float_numbers(values, math.prod(shape))
    else:
        numbers = [v if isinstance(v, int | float) else None for v in values[:2]]
    return TensorLine(number, kind.code, shape, "", numbers, text, "n", counts)


def _scalar_line(number: int, leaf: Mapping[str, Any]) -> TensorLine | None:
    """A value that is no tensor: numbers as such, everything else by what it says."""
    value = leaf.get("value")
    text = _digest((leaf["type"], value))
    if isinstance(value, int) and abs(value) < 2**63:
        return TensorLine(number, "i64", [], "", [int(value)] * 2, text, "n")
    if isinstance(value, float):
        numbers, counts = _float_numbers([value, value, value, abs(value)], 1)
        return TensorLine(number, "f64", [], "", numbers, text, "n", counts)
    return TensorLine(number, str(leaf["type"]), [], "", [None, None], text, "n")


class _Builder:
    """Collects the lines of a capture from the dumps of its steps."""

    def __init__(self, *, has_checksums: bool) -> None:
        self._has_checksums = has_checksums
        self.capture = CaptureFile(Header(FORMAT, DUMP))
        self.dtypes: Counter[str] = Counter()
        self.unmeasured = 0

    def add(self, step: int, dump: DumpFile, parents: Mapping[str, str | None]) -> None:
        """Adds one step."""
        self.capture.entries.append(step_line(step))
        folder = dump.path.parent / layout.TENSORS
        names, parents = _with_late_backwards(dump.data, parents)
        for name in names:
            level = _level(name, parents, dump.data)
            call = CallLine(name, level)
            for slot, leaf in record_leaves(dump.data[name]):
                number = len(self.capture.tensors)
                line = tensor_line(number, leaf, has_checksums=self._has_checksums)
                if line is None:
                    self.unmeasured += 1
                    continue
                self.capture.tensors[number] = line
                self.capture.values[number] = leaf
                side = call.o if slot.partition(".")[0] in _OUTPUTS else call.i
                side[slot] = [number]
                self._note(name, slot, leaf, line)
                if leaf.get("data_name"):
                    self.capture.files[number] = folder / str(leaf["data_name"])
            self.capture.entries.append(call)

    def _note(
        self, name: str, slot: str, leaf: Mapping[str, Any], line: TensorLine
    ) -> None:
        """Notes what the header tells: the commonest float type, and parameters."""
        dtype = str(leaf.get("dtype", "")).removeprefix("torch.")
        if dtype in _NARROW_FLOATS:
            self.dtypes[dtype] += 1
        call = parse_call_name(name)
        if slot.startswith("parameters.") and call is not None:
            owner = self.capture.header.weights.setdefault(call.module_path, {})
            owner.setdefault(slot.removeprefix("parameters."), line.c)


def _with_late_backwards(
    data: Mapping[str, Any], parents: Mapping[str, str | None]
) -> tuple[list[str], dict[str, str | None]]:
    """Names in order, and parents, each backward in that of its forward's module.

    That of the module may have ended before; msProbe then names no parent.
    """
    names, found = list(data), dict(parents)
    for name in data:
        if not name.endswith(".backward"):
            continue
        around = parents.get(f"{name.removesuffix('backward')}forward") or ""
        module = parents.get(name) or around.replace(".forward.", ".backward.")
        if module in data and module != around:
            found[name] = module
            if names.index(name) > names.index(module):
                names.remove(name)
                names.insert(names.index(module), name)
    return names, found


def _level(
    name: str, parents: Mapping[str, str | None], data: Mapping[str, Any]
) -> int:
    """Number of recorded modules around a call."""
    level, around, seen = 0, parents.get(name), {name}
    while around is not None and around not in seen:
        seen.add(around)
        level += around in data
        around = parents.get(around)
    return level


def has_checksums(dump: DumpFile) -> bool:
    """Whether the tensors of a dump have checksums."""
    return any(
        leaf.get("md5") is not None
        for record in dump.data.values()
        for _, leaf in record_leaves(record)
    )


def dump_capture(
    steps: Mapping[int, DumpFile],
    *,
    rank: int = 0,
    world: int = 1,
    has_checksums: bool = True,
) -> CaptureFile:
    """The dumps of one rank as a capture.

    Args:
        steps: Dumps by step.
        rank: Number of the rank.
        world: Number of ranks.
        has_checksums: Whether checksums tell what is equal, where there are any.

    Raises:
        DumpFormatError: The construct.json of a dump cannot be read.
    """
    builder = _Builder(has_checksums=has_checksums)
    for step, dump in steps.items():
        builder.add(step, dump, read_construct(dump.path.parent))
    capture = builder.capture
    first = next(iter(steps.values())).path
    capture.path = first if len(steps) == 1 else first.parents[2]
    header = capture.header
    header.test = str(capture.path)
    header.rank, header.world = rank, world
    dtype = builder.dtypes.most_common(1)
    header.signature = {"model": {"dtype": dtype[0][0] if dtype else ""}}
    if builder.unmeasured:
        header.left_out = {"unmeasured": builder.unmeasured}
    return capture


def step_line(step: int) -> StepLine:
    """A step of which only the number is known; it equals no other step."""
    return StepLine(step, -1 - step)


def whole_capture(
    capture: CaptureFile, steps: Collection[int] | None = None
) -> CaptureFile:
    """A capture or golden as its dump would be: segments combined, no sketches.

    Calls have the names of dump.json, so far as the capture knows them.

    Args:
        capture: The capture.
        steps: Which of its steps, None for all.
    """
    is_wanted = True
    header = Header(FORMAT, DUMP, capture.header.test, rank=capture.header.rank)
    header.world = capture.header.world
    header.signature = {"model": capture.header.signature.get("model", {})}
    result = CaptureFile(header, path=capture.path)
    for entry in capture.entries:
        if isinstance(entry, StepLine):
            is_wanted = steps is None or entry.step in steps
            if is_wanted:
                result.entries.append(step_line(entry.step))
            continue
        if not is_wanted:
            continue
        call = CallLine(entry.m or entry.c, entry.l)
        for slots, side in ((entry.i, call.i), (entry.o, call.o)):
            for slot, ids in slots.items():
                leaf = _whole([capture.tensors[number] for number in ids])
                number = len(result.tensors)
                line = tensor_line(number, leaf, has_checksums=False)
                if line is not None:
                    result.tensors[number] = line
                    result.values[number] = leaf
                    side[slot] = [number]
        result.entries.append(call)
    return result


def _whole(lines: list[TensorLine]) -> dict[str, Any]:
    """Segments of a tensor as a value of a dump."""
    first = lines[0]
    shape = list(first.s)
    if shape:
        shape[0] = sum(line.s[0] for line in lines)
    known = BY_CODE.get(first.d)
    highs, lows, totals, squares = (
        [value for line in lines for value in line.v[place : place + 1]
         if value is not None]
        for place in range(len(STATISTICS))
    )  # fmt: skip
    count = math.prod(shape)
    values: list[Any] = [max(highs, default=None), min(lows, default=None), None, None]
    if first.d in SKETCHED and count:
        mean = sum(map(float, totals)) / count
        norm = math.sqrt(sum(map(float, squares)))
        values[2:] = [mean, norm]
    if not shape:
        values = values[:1] * len(STATISTICS)
    nan, plus, minus = (
        any(line.x and line.x[place] for line in lines) for place in range(3)
    )
    if nan:
        values = [math.nan] * len(STATISTICS)
    elif plus or minus:
        values[0] = math.inf if plus else values[0]
        values[1] = -math.inf if minus else values[1]
        values[2:] = [math.nan, math.inf]
    dtype = f"torch.{known.name}" if known is not None else first.d
    leaf = {"type": "torch.Tensor", "dtype": dtype, "shape": shape}
    return leaf | dict(zip(STATISTICS, values, strict=True))
