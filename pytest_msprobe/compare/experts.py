# SPDX-License-Identifier: Apache-2.0
"""Where the routers of a mixture chose other experts: what follows is not judged.

Rounding may move a token to another expert, and from there on it is another
computation. Rows depend on a choice if they are of the same request, of the same
position or a later one, and computed behind that router within their step. Tokens and
log-probabilities are judged all the same, with a limit of their own.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.match import Pairs, Rows
from pytest_msprobe.dump.capture import StepLine
from pytest_msprobe.model.names import CHOICE_CLASS, display_name, parse_call_name
from pytest_msprobe.model.segments import FIRST, PROMPT

_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_WHOLE = -1


@dataclass(slots=True)
class Reroutes:
    """Choices that differ.

    Attributes:
        is_behind: (n,) pairs that depend on a choice that differs, itself included.
        first: Name of the first router that chose otherwise, empty where none did.
        positions: The first position (see _part) of each request at which one did.
    """

    is_behind: _Bools
    first: str = ""
    positions: dict[int, float] = field(default_factory=dict)

    def is_token_behind(self, label: int, number: int) -> bool:
        """Whether a generated token depends on a choice that differs.

        Args:
            label: Its request.
            number: Its number, from 0: the first one is of the prompt's end.
        """
        first = min(self.positions.get(one, math.inf) for one in (label, _WHOLE))
        return first <= 1.0 + number


def find_reroutes(pairs: Pairs, is_loose: _Bools, steps: list[StepLine]) -> Reroutes:
    """Finds what depends on choices that differ.

    Args:
        pairs: Paired rows.
        is_loose: (n,) rows in which another choice may come from rounding.
        steps: Steps of the candidate.
    """
    rows = pairs.candidate
    is_choice = is_of_choice(rows, pairs.new)
    other = np.flatnonzero(is_choice & ~pairs.is_equal & is_loose)
    if not len(other):
        return Reroutes(np.zeros(len(pairs.new), dtype=np.bool_))
    found = _Behind(rows, steps)
    for row in pairs.new[other].tolist():
        found.add(row)
    is_behind = found.depends(pairs.new)
    is_behind[other] = True
    first = int(rows.call[pairs.new[other]].min())
    name = display_name(rows.calls[first].c).rpartition(".")[0]
    return Reroutes(is_behind & is_loose, name, found.positions())


def tells_choices(rows: Rows) -> bool:
    """Whether a capture tells what routers chose."""
    return any(f".{CHOICE_CLASS}." in call.c for call in rows.calls)


def is_of_choice(rows: Rows, chosen: _I64) -> _Bools:
    """Which of some rows tell what a router chose."""
    part = f".{CHOICE_CLASS}."
    flags = np.fromiter((part in c.c for c in rows.calls), np.bool_, len(rows.calls))
    found: _Bools = flags[rows.call[chosen]]
    return found


class _Behind:
    """Rows that depend on some choices."""

    def __init__(self, rows: Rows, steps: list[StepLine]) -> None:
        self._rows = rows
        self._segments = list(rows.words.segments)
        self._labels = {s.step: {r[0] for r in s.requests} for s in steps}
        # By request: position (see _part) and router of each choice that differs.
        self._choices: dict[int, list[tuple[float, str]]] = defaultdict(list)
        # Where each router stands, by step and name.
        self._places: dict[tuple[int, str], int] = {}
        for index, call in enumerate(rows.calls):
            name = parse_call_name(call.c)
            if name is not None and name.class_name == CHOICE_CLASS:
                self._places[int(rows.steps[index]), call.c] = index

    def add(self, row: int) -> None:
        """A choice that differs."""
        rows = self._rows
        label, part = _part(self._segments[int(rows.segment[row])])
        name = rows.calls[int(rows.call[row])].c
        self._choices[label].append((part, name))

    def positions(self) -> dict[int, float]:
        """The first position of each request at which a choice differs."""
        return {
            label: min(part for part, _ in choices)
            for label, choices in self._choices.items()
        }

    def depends(self, chosen: _I64) -> _Bools:
        """Which of some rows depend on the choices."""
        rows = self._rows
        calls = rows.call[chosen]
        steps, segments = rows.steps[calls], rows.segment[chosen]
        both = segments * (int(rows.steps.max(initial=0)) + 1) + steps
        _, first, place = np.unique(both, return_index=True, return_inverse=True)
        pairs = zip(segments[first].tolist(), steps[first].tolist(), strict=True)
        least = np.array([self._first_behind(*pair) for pair in pairs])
        found: _Bools = calls > least[place.reshape(-1)]
        return found

    def _first_behind(self, segment: int, step: int) -> float:
        """The first router in a step that a segment's rows depend on."""
        label, part = _part(self._segments[segment])
        labels = (
            {label, _WHOLE}
            if label != _WHOLE
            else {_WHOLE, *self._labels.get(step, ())}
        )
        return min(
            (
                self._places.get((step, name), math.inf)
                for one in labels
                for position, name in self._choices.get(one, ())
                if position <= part or _WHOLE in (label, one)
            ),
            default=math.inf,
        )


def _part(segment: str) -> tuple[int, float]:
    """Request and position of a segment; _WHOLE for what is of no single request."""
    label, _, part = segment.partition(".")
    if not label.isdigit() or not part:
        return _WHOLE, 0.0
    order = {FIRST: 0.0, PROMPT: 1.0}
    return int(label), order[part] if part in order else 1.0 + int(part[1:])
