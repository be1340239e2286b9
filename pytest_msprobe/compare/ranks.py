# SPDX-License-Identifier: Apache-2.0
"""The captures of the ranks of one engine: whether they agree, and their sum."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_msprobe.dump.capture import (
    CallLine,
    CaptureFile,
    Header,
    StepLine,
    TensorLine,
)
from pytest_msprobe.model.verdict import RowId, Verdict
from pytest_msprobe.statistics.sketch import pack_float32, pack_int16, unpack

SHARDED = "sharded"
_LEAST_NORM = 1e-30
_SIDES = ("i", "o")


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A tensor that all ranks should hold alike and do not.

    Attributes:
        row: Where.
        ranks: The two ranks.
        error: Relative L2 error between them, from the sketches.
    """

    row: RowId
    ranks: tuple[int, int]
    error: float

    @property
    def text(self) -> str:
        """One line for a report."""
        first, second = self.ranks
        return (
            f"ranks {first} and {second} disagree first at {self.row.text}, step "
            f"{self.row.step}: rel_l2 {self.error:.3g} between copies that are to be "
            "equal"
        )


def find_disagreement(captures: Sequence[CaptureFile]) -> Disagreement | None:
    """The first replicated tensor, in execution order, that differs between ranks.

    Args:
        captures: Of all ranks; ranks that do not run a call (pipeline stages) take no
            part in it.
    """
    first = captures[0]
    others = [(capture, _calls_by_key(capture)) for capture in captures[1:]]
    for step, call in first.calls():
        if not call.p:
            continue
        for other, calls in others:
            twin = calls.get((step, call.c))
            if twin is None:
                continue
            for slot, ids, twins in _shared_slots(call, twin):
                if call.p.get(slot) != 0:
                    continue
                pairs = zip(ids, twins, strict=False)
                for own, its in pairs:
                    a, b = first.tensors[own], other.tensors[its]
                    if a.c != b.c:
                        row = RowId(call.c, slot, a.g, step)
                        ranks = (first.header.rank, other.header.rank)
                        return Disagreement(row, ranks, relative_error(a, b))
    return None


def first_failure(
    failures: Sequence[Verdict], captures: Sequence[CaptureFile]
) -> Verdict:
    """The first verdict without a divergence, else that of the rank that was first off.

    Of several the one of the lowest rank, whatever their order.

    Args:
        failures: Verdicts that are not green, at least one.
        captures: Of all ranks.
    """
    order = {
        capture.header.rank: {
            (step, call.c): number
            for number, (step, call) in enumerate(capture.calls())
        }
        for capture in captures
    }

    def place(verdict: Verdict) -> tuple[float, float, int]:
        divergence = verdict.divergence
        if divergence is None or divergence.finding is None:
            return (
                -1,
                -1,
                verdict.rank,
            )  # incomparable, missing, or a rank is missing: said first
        row = divergence.finding.row
        number = order.get(verdict.rank, {}).get((row.step, row.call), math.inf)
        return row.step, number, verdict.rank

    return min(failures, key=place)


def _calls_by_key(capture: CaptureFile) -> dict[tuple[int, str], CallLine]:
    return {(step, call.c): call for step, call in capture.calls()}


def _shared_slots(
    call: CallLine, twin: CallLine
) -> Iterator[tuple[str, list[int], list[int]]]:
    for side in _SIDES:
        own, its = getattr(call, side), getattr(twin, side)
        for slot, ids in own.items():
            if slot in its:
                yield slot, ids, its[slot]


def relative_error(a: TensorLine, b: TensorLine) -> float:
    """Relative L2 error between two segments, estimated from their sketches."""
    x, y = _sketch(a), _sketch(b)
    if x is None or y is None:
        return 0.0 if a.v == b.v else float("inf")
    norm = max(float(np.linalg.norm(x)), _LEAST_NORM)
    return float(np.linalg.norm(x - y)) / norm


def _sketch(line: TensorLine) -> npt.NDArray[np.float64] | None:
    if line.q:
        return unpack(line.q, line.a)
    return None


def combine_ranks(captures: Sequence[CaptureFile]) -> CaptureFile:
    """One capture of the unsharded model from those of all ranks.

    Columns of parallel layers add up; tensors that all ranks hold alike are taken from
    the first one. Rows that are sharded in a way that no layer tells (activations
    between two parallel layers) are left out, and their names kept in the header.

    Args:
        captures: Of all tensor-parallel ranks.
    """
    first, others = captures[0], captures[1:]
    calls = [_calls_by_key(capture) for capture in others]
    builder = _Builder()
    step = 0
    for entry in first.entries:
        if isinstance(entry, StepLine):
            step = entry.step
            builder.entries.append(entry)
            continue
        twins = [known.get((step, entry.c)) for known in calls]
        builder.add(entry, twins, first, others)
    header = _combined_header(first.header, builder.sharded)
    return CaptureFile(header, builder.tensors, builder.entries, first.path)


def _combined_header(header: Header, sharded: Sequence[str]) -> Header:
    """The header of a combined capture: its signature has no parallel sizes."""
    signature = dict(header.signature)
    model = dict(signature.get("model", {}))
    model.pop("tensor_parallel", None)
    signature["model"] = model
    signature["tp_invariant"] = True
    left_out = dict(header.left_out)
    if sharded:
        left_out[SHARDED] = len(sharded)
    return msgspec.structs.replace(
        header,
        world=1,
        rank=0,
        signature=signature,
        left_out=left_out,
        sharded=list(sharded),
        provenance={**header.provenance, "ranks": header.world},
    )


class _Builder:
    """Collects the lines of a combined capture."""

    def __init__(self) -> None:
        self.tensors: dict[int, TensorLine] = {}
        self.entries: list[CallLine | StepLine] = []
        self.sharded: list[str] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def add(
        self,
        call: CallLine,
        twins: Sequence[CallLine | None],
        first: CaptureFile,
        others: Sequence[CaptureFile],
    ) -> None:
        line = msgspec.structs.replace(call, i={}, o={}, p={})
        for side in _SIDES:
            for slot, ids in getattr(call, side).items():
                parts = [[first.tensors[i] for i in ids]]
                for twin, other in zip(twins, others, strict=True):
                    its = getattr(twin, side).get(slot, []) if twin else []
                    parts.append([other.tensors[i] for i in its])
                merged = self._merge(parts, call.p.get(slot))
                if merged is None:
                    self.sharded.append(f"{call.c}:{slot}")
                else:
                    getattr(line, side)[slot] = [self._intern(item) for item in merged]
        self.entries.append(line)

    @staticmethod
    def _merge(
        parts: list[list[TensorLine]], columns: int | None
    ) -> list[TensorLine] | None:
        """The lines of a slot over all ranks, None where their places are unknown."""
        if columns:
            by_segment = zip(*parts, strict=True)
            return [add_shards(list(lines), columns) for lines in by_segment]
        if columns == 0:
            return parts[0]
        forms = [[(line.c, line.s, line.g) for line in lines] for lines in parts]
        return parts[0] if all(form == forms[0] for form in forms) else None

    def _intern(self, line: TensorLine) -> int:
        key = (line.d, tuple(line.s), line.k, line.g, line.c, tuple(line.v))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = len(self._known)
            self.tensors[known] = msgspec.structs.replace(line, t=known)
        return known


def add_shards(lines: list[TensorLine], columns: int) -> TensorLine:
    """Adds the numbers of one segment over the ranks that hold its columns.

    Args:
        lines: One a rank; their indices are those of the unsharded tensor.
        columns: Of the unsharded tensor.
    """
    first = lines[0]
    highs = [line.v[0] for line in lines if line.v[0] is not None]
    lows = [line.v[1] for line in lines if line.v[1] is not None]
    values: list[float | int | None] = [
        max(highs) if highs else None,
        min(lows) if lows else None,
    ]
    for place in range(2, len(first.v)):
        terms = [line.v[place] for line in lines]
        values.append(sum(term for term in terms if term is not None))
    checksum = sum(int(line.c, 16) for line in lines) % 2**64
    counts = [line.x or [0, 0, 0] for line in lines]
    nonfinite = [sum(column) for column in zip(*counts, strict=True)]
    text, scale = first.q, first.a
    sketches = [sketch for line in lines if (sketch := _sketch(line)) is not None]
    if sketches:
        total = np.sum(sketches, axis=0)
        if scale is None:
            text = pack_float32(np.concatenate((total, np.zeros(32))))
        else:
            text, scale = pack_int16(total)
    return msgspec.structs.replace(
        first,
        s=[first.s[0], columns],
        v=values,
        c=f"{checksum:016x}",
        x=nonfinite if any(nonfinite) else [],
        q=text,
        a=scale,
    )


def without_sharded(
    golden: CaptureFile, candidate: CaptureFile
) -> tuple[CaptureFile, CaptureFile]:
    """Two combined captures with only the rows that both could combine."""
    names = {*golden.header.sharded, *candidate.header.sharded}
    return _without(golden, names), _without(candidate, names)


def _without(capture: CaptureFile, names: set[str]) -> CaptureFile:
    entries: list[CallLine | StepLine] = []
    for entry in capture.entries:
        if isinstance(entry, CallLine):
            entry = msgspec.structs.replace(  # noqa: PLW2901 - the line with fewer slots
                entry,
                i={
                    s: ids
                    for s, ids in entry.i.items()
                    if f"{entry.c}:{s}" not in names
                },
                o={
                    s: ids
                    for s, ids in entry.o.items()
                    if f"{entry.c}:{s}" not in names
                },
            )
        entries.append(entry)
    return CaptureFile(capture.header, capture.tensors, entries, capture.path)
