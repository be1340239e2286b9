# SPDX-License-Identifier: Apache-2.0
"""Pairs the rows of a candidate with those of a golden and lays them out as columns."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import overload

import numpy as np
import numpy.typing as npt

from pytest_msprobe.dump.call_table import CallName, call_columns
from pytest_msprobe.dump.capture import DUMP, CaptureFile, TensorLine, class_code
from pytest_msprobe.dump.columns import Columns, differs, table_columns
from pytest_msprobe.model.names import MODULE_PREFIX, parse_call_name
from pytest_msprobe.model.verdict import RowId

_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
# Bits of a row's key that number its segment, or its step.
_PART_BITS = 28
# Fields of many calls at once.
_name_and_level = attrgetter("c", "l")


def parents_of(calls: Sequence[CallName]) -> list[str]:
    """Name of the recorded module around each call, empty at the top.

    Calls stand in the order in which they ended, so a call's parent is the first one
    behind it that is one level higher.
    """
    parents = [""] * len(calls)
    around: list[str] = []
    for index in range(len(calls) - 1, -1, -1):
        call = calls[index]
        level = call.l
        del around[level:]
        if len(around) < level:
            around.extend([""] * (level - len(around)))
        if level:
            parents[index] = around[level - 1]
        around.append(call.c)
    return parents


def places_of(calls: Sequence[CallName], steps: Sequence[int]) -> list[str]:
    """What identifies each call within its step.

    A module's is its name. APIs are numbered over the whole step in their names, so
    that one call more would shift all later ones; they are identified by the module
    around them and their number within it.
    """
    places = [""] * len(calls)
    apis: dict[str, str] = {}
    # Most steps make the same calls as an earlier one.
    known: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for chosen in _by_step(steps):
        form = tuple(map(_name_and_level, map(calls.__getitem__, chosen)))
        found = known.get(form)
        if found is None:
            found = known[form] = _places_of_step([calls[i] for i in chosen], apis)
        if len(chosen) == chosen[-1] - chosen[0] + 1:
            places[chosen[0] : chosen[-1] + 1] = found
            continue
        for index, place in zip(chosen, found, strict=True):
            places[index] = place
    return places


def _by_step(steps: Sequence[int]) -> Iterable[Sequence[int]]:
    """Indices of the calls of each step, in order."""
    found: dict[int, range | list[int]] = {}
    first = 0
    for step, same in groupby(steps):
        last = first + sum(1 for _ in same)
        part = range(first, last)
        found[step] = [*found[step], *part] if step in found else part
        first = last
    return found.values()


def _places_of_step(calls: Sequence[CallName], apis: dict[str, str]) -> list[str]:
    """Places of the calls of one step.

    Args:
        calls: The calls.
        apis: Prefix and name by the name of a call, empty for modules; added to.
    """
    places: list[str] = []
    counts: Counter[str] = Counter()
    for call, parent in zip(calls, parents_of(calls), strict=True):
        text = call.c
        api = apis.get(text)
        if api is None:
            name = parse_call_name(text)
            api = ""
            if name is not None and not name.is_module:
                api = f"{name.prefix}.{name.path}"
            apis[text] = api
        if not api:
            places.append(text)
            continue
        api = f"{parent}>{api}"
        number = counts[api]
        counts[api] = number + 1
        places.append(f"{api}.{number}")
    return places


@dataclass(slots=True)
class Vocabulary:
    """Numbers for the texts that identify rows, shared by two captures.

    Attributes:
        places: Places of calls.
        slots: Slots.
        segments: Segments.
    """

    places: dict[str, int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Rows:
    """The rows of one capture in execution order; the first of equal keys counts.

    Attributes:
        capture: The capture.
        calls: Name and level of all calls.
        steps: (c,) step of each call.
        lines: The tensors that the calls refer to.
        columns: The same as columns.
        words: What the numbers of slots and segments mean.
        key: (n,) identity of each row: place of its call, slot and segment; without a
            segment also its step.
        call: (n,) call of each row.
        slot: (n,) its slot.
        tensor: (n,) its tensor, as an index into `lines` and `columns`.
        segment: (n,) its segment.
        is_output: (n,) whether it is of an output slot.
        uses: (m, 2) call and row of every slot segment, those of equal keys included;
            by call.
    """

    capture: CaptureFile
    calls: list[CallName]
    steps: _I64
    lines: "Lines"
    columns: Columns
    words: Vocabulary
    key: _I64
    call: _I64
    slot: _I64
    tensor: _I64
    segment: _I64
    is_output: _Bools
    uses: _I64

    @property
    def slot_key(self) -> _I64:
        """(n,) place and slot of each row, whatever its segment or step."""
        found: _I64 = self.key >> np.int64(_PART_BITS)
        return found

    def row_ids(self, rows: _I64) -> list[RowId]:
        """Identity of some rows."""
        slots, segments = list(self.words.slots), list(self.words.segments)
        steps = self.steps[self.call[rows]]
        columns = (self.call[rows], self.slot[rows], self.segment[rows], steps)
        return [
            RowId(self.calls[call].c, slots[slot], segments[segment], step)
            for call, slot, segment, step in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]

    def names(self, rows: _I64) -> list[str]:
        """Names of some rows, as globs in rules are matched with."""
        calls = [call.c for call in self.calls]
        slots = list(self.words.slots)
        tails = [f"@{text}" if text else "" for text in self.words.segments]
        columns = (
            column[rows].tolist() for column in (self.call, self.slot, self.segment)
        )
        return [
            f"{calls[call]}.{slots[slot]}{tails[segment]}"
            for call, slot, segment in zip(*columns, strict=True)
        ]

    def is_of_module(self, rows: _I64) -> _Bools:
        """Which of some rows are of module calls (L0)."""
        prefix = MODULE_PREFIX + "."
        flags = [call.c.startswith(prefix) for call in self.calls]
        is_module = np.array(flags, dtype=np.bool_)
        found: _Bools = is_module[self.call[rows]]
        return found

    def in_segments(self, rows: _I64, test: Callable[[str], bool]) -> _Bools:
        """Which of some rows are of segments with a property; each is tested once."""
        words = self.words.segments
        flags = np.fromiter((test(text) for text in words), np.bool_, len(words))
        found: _Bools = flags[self.segment[rows]]
        return found

    def has_sums(self, rows: _I64) -> _Bools:
        """Which of some rows are of float types; integers have extremes only."""
        found: _Bools = self.columns.has_sums[self.tensor[rows]]
        return found

    def is_of_class(self, rows: _I64, row_class: str) -> _Bools:
        """Which of some rows are of a row class."""
        code = class_code(row_class)
        classes = self.columns.classes
        flags = [classes[place] == code for place in self.tensor[rows].tolist()]
        return np.array(flags, dtype=np.bool_)


class Lines(Sequence[TensorLine]):
    """The `t` lines of a capture by place; those of a file are made when asked for."""

    def __init__(self, tensors: MutableMapping[int, TensorLine]) -> None:
        self._tensors = tensors
        self._ids = list(tensors)

    def __len__(self) -> int:
        """Number of lines."""
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> TensorLine: ...
    @overload
    def __getitem__(self, place: slice) -> list[TensorLine]: ...
    def __getitem__(self, place: int | slice) -> TensorLine | list[TensorLine]:
        """Lines by place."""
        if isinstance(place, slice):
            return [self._tensors[number] for number in self._ids[place]]
        return self._tensors[self._ids[place]]


@dataclass(slots=True)
class _Uses:
    """Every slot segment of a capture, in execution order.

    Attributes:
        capture: The capture.
        calls: Name and level of all calls.
        steps: (c,) step of each call.
        lines: Tensors.
        columns: The same as columns.
        place: (m,) place of its call.
        call: (m,) its call.
        slot: (m,) its slot.
        tensor: (m,) its tensor.
        segment: (m,) its segment.
        is_output: (m,) whether it is of an output slot.
    """

    capture: CaptureFile
    calls: list[CallName]
    steps: _I64
    lines: Lines
    columns: Columns
    place: _I64
    call: _I64
    slot: _I64
    tensor: _I64
    segment: _I64
    is_output: _Bools


def _collect(capture: CaptureFile, words: Vocabulary) -> _Uses:
    calls = call_columns(capture.entries)
    known = words.slots
    numbers = np.array(
        [known.setdefault(slot, len(known)) for slot in calls.words], dtype=np.int64
    )
    counts = np.diff(np.array(calls.ends, dtype=np.int64), prepend=0)
    call_column = np.repeat(np.arange(len(calls.names)), counts)
    slots = np.repeat(np.array(calls.slots), np.array(calls.sizes, dtype=np.int64))
    tensor_column = _positions(capture.tensors, np.array(calls.used, dtype=np.int64))
    columns = table_columns(capture.tensors)
    segments = _numbers(words.segments, columns.segments)
    places = _numbers(words.places, places_of(calls.names, calls.steps))
    return _Uses(
        capture,
        calls.names,
        np.array(calls.steps, dtype=np.int64),
        Lines(capture.tensors),
        columns,
        places[call_column],
        call_column,
        numbers[slots >> 1],
        tensor_column,
        segments[tensor_column],
        (slots & 1).astype(np.bool_),
    )


def _numbers(known: dict[str, int], texts: Sequence[str]) -> _I64:
    """Numbers of texts, new ones added."""
    for text in dict.fromkeys(texts):
        known.setdefault(text, len(known))
    return np.fromiter(map(known.__getitem__, texts), np.int64, len(texts))


def _positions(tensors: MutableMapping[int, TensorLine], found: _I64) -> _I64:
    """Where the tensors with these ids stand among all."""
    known = np.fromiter(tensors, np.int64, len(tensors))
    if (known == np.arange(len(known))).all():
        return found
    order = np.argsort(known)
    place: _I64 = order[np.searchsorted(known, found, sorter=order)]
    return place


def _rows(uses: _Uses, words: Vocabulary) -> Rows:
    """Rows of a capture once all words of both captures are known."""
    whole = words.segments.get("", -1)
    # A tensor without a segment is identified by its step instead.
    part = np.where(
        uses.segment == whole, len(words.segments) + uses.steps[uses.call], uses.segment
    )
    key = uses.place * len(words.slots) + uses.slot
    key = (key << np.int64(_PART_BITS)) + part
    _, first, same = np.unique(key, return_index=True, return_inverse=True)
    # np.unique sorts by key; rows stand in execution order.
    chosen = np.sort(first)
    number = np.empty(len(chosen), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(chosen))
    return Rows(
        uses.capture,
        uses.calls,
        uses.steps,
        uses.lines,
        uses.columns,
        words,
        key[chosen],
        uses.call[chosen],
        uses.slot[chosen],
        uses.tensor[chosen],
        uses.segment[chosen],
        uses.is_output[chosen],
        np.stack([uses.call, number[same.reshape(-1)]], axis=1),
    )


@dataclass(slots=True)
class Pairs:
    """Rows that both captures have, in the candidate's execution order.

    Attributes:
        golden: All rows of the golden.
        candidate: All rows of the candidate.
        old: (n,) the golden's row of each pair.
        new: (n,) the candidate's.
        is_equal: (n,) whether dtype, shape and checksum are equal.
        missing: Rows of the golden only.
        extra: Rows of the candidate only.
        is_dump: Whether one side comes from a dump, which has no sketches.
    """

    golden: Rows
    candidate: Rows
    old: _I64
    new: _I64
    is_equal: _Bools
    missing: _I64
    extra: _I64
    is_dump: bool = False

    @property
    def ids(self) -> list[RowId]:
        """Identity of each pair."""
        return self.candidate.row_ids(self.new)

    def line_pair(self, index: int) -> tuple[TensorLine, TensorLine]:
        """Both `t` lines of a pair."""
        old, new = self.line_pairs(np.array([index]))
        return old[0], new[0]

    def line_pairs(self, index: _I64) -> tuple[list[TensorLine], list[TensorLine]]:
        """Both sides' `t` lines of some pairs."""
        golden, candidate = self.golden.lines, self.candidate.lines
        old = self.golden.tensor[self.old[index]].tolist()
        new = self.candidate.tensor[self.new[index]].tolist()
        return [golden[i] for i in old], [candidate[i] for i in new]

    def columns(self, name: str, index: _I64) -> tuple[list[object], list[object]]:
        """Both sides' column of texts or shapes of some pairs."""
        old, new = (
            getattr(side.columns, name) for side in (self.golden, self.candidate)
        )
        return (
            [old[place] for place in self.golden.tensor[self.old[index]].tolist()],
            [new[place] for place in self.candidate.tensor[self.new[index]].tolist()],
        )

    def numbers(self, index: _I64) -> tuple[Columns, Columns]:
        """Both sides' numbers of some pairs."""
        return (
            self.golden.columns.at(self.golden.tensor[self.old[index]]),
            self.candidate.columns.at(self.candidate.tensor[self.new[index]]),
        )


class PairNames(Sequence[str]):
    """Names of the pairs, of the missing and of the new rows, made when asked for."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._made: list[str] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._pairs.new) + len(self._pairs.missing) + len(self._pairs.extra)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        """Names by place."""
        if self._made is None:
            pairs = self._pairs
            self._made = [
                *pairs.candidate.names(pairs.new),
                *pairs.golden.names(pairs.missing),
                *pairs.candidate.names(pairs.extra),
            ]
        return self._made[place]


def pair_rows(
    golden: CaptureFile,
    candidate: CaptureFile,
    renames: Mapping[str, str] | None = None,
) -> Pairs:
    """Pairs rows by key.

    Args:
        golden: The golden.
        candidate: The candidate.
        renames: Rows of the candidate, as `call.slot`, with the rows of the golden that
            they are to be paired with.
    """
    words = Vocabulary()
    uses = _collect(golden, words), _collect(candidate, words)
    if renames:
        _rename(*uses, words, renames)
    left, right = (_rows(side, words) for side in uses)
    _, old, new = np.intersect1d(
        left.key, right.key, assume_unique=True, return_indices=True
    )
    order = np.argsort(new)
    old, new = old[order], new[order]
    pairs = Pairs(
        left,
        right,
        old,
        new,
        np.zeros(len(old), dtype=np.bool_),
        np.setdiff1d(np.arange(len(left.key)), old),
        np.setdiff1d(np.arange(len(right.key)), new),
        DUMP in (golden.header.kind, candidate.header.kind),
    )
    pairs.is_equal[:] = True
    for name in ("checksums", "codes", "shapes"):
        equal = np.flatnonzero(pairs.is_equal)
        pairs.is_equal[equal] = ~differs(*pairs.columns(name, equal))
    return pairs


def rows_of(capture: CaptureFile) -> Rows:
    """All rows of one capture."""
    words = Vocabulary()
    return _rows(_collect(capture, words), words)


def row_names(*captures: CaptureFile) -> list[str]:
    """Names that globs in rules are matched with, of all rows of some captures."""
    found: dict[str, None] = {}
    for capture in captures:
        rows = rows_of(capture)
        found.update(dict.fromkeys(rows.names(np.arange(len(rows.key)))))
    return list(found)


def _rename(
    golden: _Uses, candidate: _Uses, words: Vocabulary, renames: Mapping[str, str]
) -> None:
    """Gives rows of the candidate the place and slot of rows of the golden."""
    slots = list(words.slots)
    wanted = set(renames.values())
    places: dict[str, tuple[int, int]] = {}
    for i in range(len(golden.call)):
        name = f"{golden.calls[golden.call[i]].c}.{slots[golden.slot[i]]}"
        if name in wanted:
            places.setdefault(name, (int(golden.place[i]), int(golden.slot[i])))
    for i in range(len(candidate.call)):
        name = f"{candidate.calls[candidate.call[i]].c}.{slots[candidate.slot[i]]}"
        target = places.get(renames.get(name, ""))
        if target is not None:
            candidate.place[i], candidate.slot[i] = target


def distinct(pairs: Pairs, index: _I64) -> tuple[_I64, _I64]:
    """One of the rows for each pair of tensors, and for every row its pair's place."""
    old = pairs.golden.tensor[pairs.old[index]]
    new = pairs.candidate.tensor[pairs.new[index]]
    both = old * len(pairs.candidate.lines) + new
    _, first, place = np.unique(both, return_index=True, return_inverse=True)
    return index[first], place.reshape(-1)
