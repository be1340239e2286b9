# SPDX-License-Identifier: Apache-2.0
"""From the steps of a capture to the lines of its file.

Here the class of every slot is settled, the chunks of a prompt that was computed in
several steps are added up, and equal segments are written once and referred to.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from pytest_msprobe.debugger.calls import walk_scalars, walk_tensors
from pytest_msprobe.dump.capture import (
    CallLine,
    Line,
    StepLine,
    TensorLine,
    class_code,
)
from pytest_msprobe.model.calls import CallRecord, StepRecord, TensorValue
from pytest_msprobe.model.dtypes import element_type, is_narrow, is_sketched
from pytest_msprobe.model.records import Numbers, combine, read_numbers
from pytest_msprobe.model.segments import PADDING, WHOLE, RowClassifier
from pytest_msprobe.statistics.sketch import pack_float32, pack_int16

_UNJUDGED = ("undefined", "opaque")


@dataclass(slots=True)
class _Part:
    """A segment of a slot's tensor in one step."""

    segment: str
    rows: int
    first_position: int
    numbers: Numbers


@dataclass(slots=True)
class Assembly:
    """The lines of a capture file.

    Attributes:
        lines: In execution order.
        left_out: Slots that are not judged, counted by reason.
        rows: Slot segments that calls refer to.
    """

    lines: list[Line] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    rows: int = 0


def slots_of(call: CallRecord) -> tuple[list[tuple[str, TensorValue]], ...]:
    """Input and output tensors of a call with their slots."""
    inputs = walk_tensors(call.input_args, "input_args")
    inputs += walk_tensors(call.input_kwargs, "input_kwargs")
    return inputs, walk_tensors(call.output, "output")


def assemble(
    steps: Iterable[StepRecord], model_dimensions: frozenset[int] = frozenset()
) -> Assembly:
    """Writes the steps of a capture as lines.

    Args:
        steps: In order.
        model_dimensions: Sizes that parameters of the model have.
    """
    return _Assembler(list(steps), RowClassifier(model_dimensions)).run()


class _Assembler:
    def __init__(self, steps: list[StepRecord], classifier: RowClassifier) -> None:
        self._result = Assembly()
        self._steps = [_without_preparation(step, self._result) for step in steps]
        self._classifier = classifier
        self._ids: dict[tuple[object, ...], int] = {}
        # Segments that several steps computed a part of, by (slot, segment).
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        self._emitted: set[tuple[str, str]] = set()

    def run(self) -> Assembly:
        for step in self._steps:
            self._observe(step)
        self._find_chunks()
        for step in self._steps:
            self._emit_step(step)
        return self._result

    def _observe(self, step: StepRecord) -> None:
        """Notes which slots were token-major in this step."""
        tokens = step.layout.padded_tokens if step.layout is not None else 0
        for call in step.calls:
            for slots in slots_of(call):
                for slot, value in slots:
                    first = tokens if value.row_class == "token" else None
                    name = f"{call.key}:{slot}"
                    self._classifier.observe(name, dimension_0=first, tokens=tokens)

    def _find_chunks(self) -> None:
        for step in self._steps:
            for call in step.calls:
                for slots in slots_of(call):
                    for slot, value in slots:
                        self._note_parts(f"{call.key}:{slot}", value)
        self._parts = {
            key: parts for key, parts in self._parts.items() if len(parts) > 1
        }

    def _note_parts(self, name: str, value: TensorValue) -> None:
        if value.role in _UNJUDGED or value.rows is None:
            return
        for part in self._split(name, value):
            if part.segment != WHOLE:
                self._parts.setdefault((name, part.segment), []).append(part)

    def _split(self, name: str, value: TensorValue) -> list[_Part]:
        """Defined segments of a value; one whole part where it is of neither class."""
        assert value.rows is not None
        numbers = [read_numbers(row, value.dtype) for row in value.rows]
        if self._row_class(name, value) == "neither":
            total = numbers[0]
            for other in numbers[1:]:
                total = combine(total, other)
            return [_Part(WHOLE, value.shape[0] if value.shape else 1, 0, total)]
        return [
            _Part(piece.segment, piece.rows, piece.position, item)
            for piece, item in zip(value.pieces, numbers, strict=True)
            if piece.is_defined and piece.segment != PADDING
        ]

    def _row_class(self, name: str, value: TensorValue) -> str:
        if value.row_class == "token" and not self._classifier.is_token_major(name):
            return "neither"
        return value.row_class

    def _emit_step(self, step: StepRecord) -> None:
        line = StepLine(step.step)
        if step.layout is not None:
            line.tokens = step.layout.tokens
            line.requests = [
                (r.label, r.rows, r.position) for r in step.layout.requests
            ]
        self._result.lines.append(line)
        for call in step.calls:
            self._emit_call(call)

    def _emit_call(self, call: CallRecord) -> None:
        line = CallLine(call.key, call.depth)
        if call.name != call.key:
            line.m = call.name
        inputs, outputs = slots_of(call)
        for slots, target in ((inputs, line.i), (outputs, line.o)):
            for slot, value in slots:
                ids = self._emit_slot(call, line, slot, value)
                if ids:
                    target[slot] = ids
        for tree, side in (
            (call.input_args, "input_args"),
            (call.input_kwargs, "input_kwargs"),
        ):
            line.x.update(walk_scalars(tree, side))
        line.x = {slot: _portable(item) for slot, item in line.x.items()}
        self._result.lines.append(line)

    def _emit_slot(
        self, call: CallRecord, line: CallLine, slot: str, value: TensorValue
    ) -> list[int]:
        if value.role in _UNJUDGED:
            line.r[slot] = value.role
            self._result.left_out[value.role] += 1
            return []
        if value.rows is None:
            if value.shape and 0 not in value.shape:
                self._result.left_out["unmeasured"] += 1
            return []
        if value.place is not None:
            line.p[slot] = value.place.columns
        name = f"{call.key}:{slot}"
        row_class = self._row_class(name, value)
        ids = []
        for part in self._split(name, value):
            key = (name, part.segment)
            chunks = self._parts.get(key)
            if chunks is not None:
                if key in self._emitted:
                    continue
                self._emitted.add(key)
                part = _merge(chunks)  # noqa: PLW2901 - the part with its later chunks
            ids.append(self._emit_tensor(part, value, row_class))
        self._result.rows += len(ids)
        return ids

    def _emit_tensor(self, part: _Part, value: TensorValue, row_class: str) -> int:
        shape = list(value.shape)
        if row_class != "neither":
            shape[0] = part.rows
        is_part = value.place is not None and value.place.columns > 0
        line = tensor_line(
            part.numbers,
            value.dtype,
            shape,
            row_class,
            part.segment,
            is_part=is_part,
        )
        key = (line.d, tuple(line.s), line.k, line.g, line.c, tuple(line.v))
        known = self._ids.get(key)
        if known is None:
            known = self._ids[key] = line.t = len(self._ids)
            self._result.lines.append(line)
        return known


def _without_preparation(step: StepRecord, result: Assembly) -> StepRecord:
    """A step without the API calls that the runner makes around the forward.

    They work on buffers that live on between steps, whose other elements are left over
    from earlier requests. What they prepare is seen again as inputs of modules. Calls
    of modules (encoders, poolers) and all inside them stay.
    """
    calls = [
        call
        for call in step.calls
        if call.phase not in ("outside", "after")
        or call.parent is not None
        or call.parameters is not None
    ]
    if len(calls) < len(step.calls):
        result.left_out["preparation"] += len(step.calls) - len(calls)
    return replace(step, calls=calls)


def _merge(chunks: list[_Part]) -> _Part:
    """Adds the chunks of a segment up; a part computed twice counts once."""
    merged = chunks[0]
    seen = {chunks[0].first_position}
    for chunk in chunks[1:]:
        if chunk.first_position in seen:
            continue
        seen.add(chunk.first_position)
        numbers = combine(merged.numbers, chunk.numbers)
        first = min(merged.first_position, chunk.first_position)
        merged = _Part(merged.segment, merged.rows + chunk.rows, first, numbers)
    return merged


def tensor_line(
    numbers: Numbers,
    dtype: str,
    shape: list[int],
    row_class: str,
    segment: str,
    *,
    is_part: bool = False,
) -> TensorLine:
    """A `t` line without its id.

    Args:
        numbers: Numbers of the segment.
        dtype: Name of the element type.
        shape: Shape of the segment.
        row_class: `token`, `sample` or `neither`.
        segment: Name of the segment.
        is_part: Whether other ranks hold the rest: a single element then has a sketch.
    """
    values: list[float | int | None] = [numbers.maximum, numbers.minimum]
    line = TensorLine(
        t=0,
        d=element_type(dtype).code,
        s=shape,
        k=class_code(row_class),
        g=segment,
        v=values,
        c=f"{numbers.checksum:016x}",
    )
    if is_sketched(dtype):
        values.extend((_short(numbers.total), _short(numbers.squares)))
        if numbers.nonfinite:
            line.x = [numbers.nan, numbers.positive_inf, numbers.negative_inf]
        sketch = numbers.sketch if numbers.sketch is not None else np.zeros(64)
        if numbers.count == 1 and not is_part:
            return line
        if is_narrow(dtype):
            line.q, line.a = pack_int16(sketch)
        else:
            line.q = pack_float32(sketch)
    return line


def _short(value: float | None) -> float | None:
    """A sum rounded to 8 digits: shorter as text, and far below every limit."""
    return None if value is None else float(f"{value:.8g}")


def _portable(item: object) -> object:
    """A value that JSON holds: non-finite floats as text."""
    if isinstance(item, float) and not np.isfinite(item):
        return str(item)
    if isinstance(item, bool | int | float | str | list) or item is None:
        return item
    return str(item)
