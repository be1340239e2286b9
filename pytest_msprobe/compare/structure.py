# SPDX-License-Identifier: Apache-2.0
"""Calls that only one of two captures has: renamed, fused, new or gone.

Judging goes on around them; each is reported with its nearest match on the other side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from pytest_msprobe.compare.match import Rows, parents_of, places_of
from pytest_msprobe.dump.capture import CallLine, TensorLine
from pytest_msprobe.model.names import CHOICE_CLASS, display_name, parse_call_name
from pytest_msprobe.model.verdict import StructureChange

# A match has more than a similar name: the module around it, its class or its numbers.
_LEAST_SCORE = 1.5


@dataclass(frozen=True, slots=True)
class _Place:
    """One call of one side.

    Attributes:
        call: Name of the call.
        around: Path of the module around it.
        kind: Class of a module, name of an API.
        name: Last part of a module's path, or the API.
        shapes: Columns of its outputs' segments.
        checksums: Of its outputs.
    """

    call: str
    around: str
    kind: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    checksums: tuple[str, ...]


def structure_changes(
    golden: Rows, candidate: Rows, *, has_apis: bool
) -> list[StructureChange]:
    """Calls that only one side has, those of the golden first.

    Args:
        golden: Rows of the golden.
        candidate: Rows of the candidate.
        has_apis: Whether calls of APIs count as well as those of modules.
    """
    old, new = (_places(side, has_apis=has_apis) for side in (golden, candidate))
    gone = [place for key, place in old.items() if key not in new]
    added = [place for key, place in new.items() if key not in old]
    changes, taken = [], set()
    for place in gone:
        match = _nearest(place, added)
        if match is None:
            changes.append(StructureChange(gone=place.call))
            continue
        taken.add(match.call)
        is_equal = bool(place.checksums) and place.checksums == match.checksums
        changes.append(StructureChange(place.call, match.call, is_equal=is_equal))
    changes += [
        StructureChange(new=place.call) for place in added if place.call not in taken
    ]
    return changes


def _places(rows: Rows, *, has_apis: bool) -> dict[str, _Place]:
    """The calls of one side by their place, each once."""
    keys = places_of(rows.calls, rows.steps.tolist())
    lines = {line.t: line for line in rows.lines}
    found: dict[str, _Place] = {}
    calls = (call for _, call in rows.capture.calls())
    for key, call, parent in zip(keys, calls, parents_of(rows.calls), strict=True):
        if key in found or not (call.i or call.o):
            continue
        name = parse_call_name(call.c)
        if name is None or not (name.is_module or has_apis):
            continue
        if name.class_name == CHOICE_CLASS:  # no module of the model
            continue
        found[key] = _place(call, parent, lines)
    return found


def _place(call: CallLine, parent: str, lines: dict[int, TensorLine]) -> _Place:
    name = parse_call_name(call.c)
    assert name is not None
    outputs = [lines[number] for ids in call.o.values() for number in ids]
    around, own, kind = display_name(parent), name.path, name.path
    if name.is_module:
        around, _, own = name.module_path.rpartition(".")
        kind = name.class_name
    shapes = tuple(tuple(line.s) for line in outputs)
    return _Place(call.c, around, kind, own, shapes, tuple(line.c for line in outputs))


def _nearest(place: _Place, others: Sequence[_Place]) -> _Place | None:
    """The other side's call that is most like one, if any is."""
    best, most = None, _LEAST_SCORE
    for other in others:
        score = SequenceMatcher(None, place.name, other.name).ratio()
        score += place.around == other.around
        score += place.kind == other.kind
        score += place.shapes == other.shapes
        score += bool(place.checksums) and place.checksums == other.checksums
        if score > most:
            best, most = other, score
    return best
