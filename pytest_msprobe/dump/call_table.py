# SPDX-License-Identifier: Apache-2.0
"""The calls of a capture as columns: what pairing rows works with.

As with tensors (columns.py), a file's lines are taken apart while it is read, and one
that is asked for is made again.
"""

from array import array
from collections.abc import Callable, Iterable, MutableSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from pytest_msprobe.errors import DumpFormatError

if TYPE_CHECKING:
    from collections.abc import Container

    from pytest_msprobe.dump.capture import CallLine, StepLine


@dataclass(frozen=True, slots=True)
class CallName:
    """Name and level of calls. Fields are those of a `c` line.

    Attributes:
        c: Name.
        l: Number of recorded modules around it.
    """

    c: str
    l: int  # noqa: E741 - the name in the file


@dataclass(slots=True)
class CallColumns:
    """Calls in their order, and the slots of all of them one behind the other.

    Attributes:
        names: Name and level of each call, one object for all equal ones.
        steps: Step of each call.
        ends: Number of tensors in the slots of each call and those before it.
        slots: For each slot twice the place of its text in `words`, and 1 more for
            those of outputs.
        sizes: Number of tensors in each slot.
        used: Their ids.
        words: Texts of slots.
    """

    names: list[CallName] = field(default_factory=list)
    steps: "array[int]" = field(default_factory=lambda: array("q"))
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    slots: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    used: "array[int]" = field(default_factory=lambda: array("q"))
    words: dict[str, int] = field(default_factory=dict)
    _known: dict[tuple[str, int], CallName] = field(default_factory=dict)

    def add(self, call: "CallLine", step: int) -> None:
        """The next call."""
        for side, slots in enumerate((call.i, call.o)):
            for slot, ids in slots.items():
                number = self.words.setdefault(slot, len(self.words))
                self.slots.append(2 * number + side)
                self.sizes.append(len(ids))
                self.used.extend(ids)
        self.end(call.c, call.l, step)

    def end(self, name: str, level: int, step: int) -> None:
        """The end of a call whose slots were added."""
        known = self._known.get((name, level))
        if known is None:
            known = self._known[name, level] = CallName(name, level)
        self.names.append(known)
        self.steps.append(step)
        self.ends.append(len(self.used))


class _Slots(dict[str, int]):
    """Numbers of the slots of one side as they stand in a file."""

    def __init__(self, words: dict[str, int], lengthen: Callable[[str], str]) -> None:
        super().__init__()
        self._words = words
        self._lengthen = lengthen

    def __missing__(self, slot: str) -> int:
        """Numbers a slot that was not met before."""
        text = self._lengthen(slot)
        number = self[slot] = self._words.setdefault(text, len(self._words))
        return number


class CallTable(MutableSequence["CallLine | StepLine"]):
    """Calls and steps of a file in order: columns, and calls made when asked for.

    Entries may be changed, replaced, removed and added as in a list: the columns
    follow.
    """

    def __init__(
        self,
        decode: "Callable[[bytes], CallLine | StepLine]",
        inputs: Callable[[str], str],
        outputs: Callable[[str], str],
    ) -> None:
        """An empty table.

        Args:
            decode: Makes an entry from its bytes in the file.
            inputs: Makes the text of an input slot from that in the file.
            outputs: Likewise of an output slot.
        """
        self._decode = decode
        self._entries: list[CallLine | StepLine | None] = []
        self._bytes: list[bytes] = []
        self._made: list[int] = []
        self._columns = CallColumns()
        self._inputs = _Slots(self._columns.words, inputs)
        self._outputs = _Slots(self._columns.words, outputs)
        self._step = 0
        self._is_changed = False

    def add_step(self, content: bytes, step: "StepLine") -> None:
        """The next step of the file."""
        self._step = step.step
        self._made.append(len(self._entries))
        self._entries.append(step)
        self._bytes.append(content)

    def add_call(
        self, content: bytes, call: "CallLine", known: "Container[int]"
    ) -> None:
        """The next call of the file.

        Args:
            content: Its bytes.
            call: The same, decoded, slots as in the file; it itself is not kept.
            known: Ids of the tensors that stand before it.

        Raises:
            DumpFormatError: It refers to another one.
        """
        columns = self._columns
        for side, (slots, numbers) in enumerate(
            ((call.i, self._inputs), (call.o, self._outputs))
        ):
            for slot, ids in slots.items():
                for number in ids:
                    if number not in known:
                        message = f"tensor {number} does not stand before it"
                        raise DumpFormatError(message)
                columns.slots.append(2 * numbers[slot] + side)
                columns.sizes.append(len(ids))
                columns.used.fromlist(ids)
        columns.end(call.c, call.l, self._step)
        self._entries.append(None)
        self._bytes.append(content)

    def columns(self) -> CallColumns:
        """Columns of all calls."""
        if self._is_changed or any(
            self._entries[place] != self._decode(self._bytes[place])
            for place in self._made
        ):
            return columns_of(self)
        return self._columns

    def steps(self) -> "list[StepLine]":
        """Steps in order; no call is made for it."""
        from pytest_msprobe.dump.capture import StepLine

        return [entry for entry in self._entries if isinstance(entry, StepLine)]

    @overload
    def __getitem__(self, place: int) -> "CallLine | StepLine": ...
    @overload
    def __getitem__(self, place: slice) -> "MutableSequence[CallLine | StepLine]": ...
    def __getitem__(
        self, place: int | slice
    ) -> "CallLine | StepLine | MutableSequence[CallLine | StepLine]":
        """Entries by place."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        entry = self._entries[place]
        if entry is None:
            number = range(len(self))[place]
            entry = self._entries[number] = self._decode(self._bytes[number])
            self._made.append(number)
        return entry

    @overload
    def __setitem__(self, place: int, entry: "CallLine | StepLine") -> None: ...
    @overload
    def __setitem__(
        self, place: slice, entry: "Iterable[CallLine | StepLine]"
    ) -> None: ...
    def __setitem__(self, place, entry):  # type: ignore[no-untyped-def]
        """Puts entries in the place of others."""
        self._all_made()[place] = entry

    def __delitem__(self, place: int | slice) -> None:
        """Removes entries."""
        del self._all_made()[place]

    def insert(self, place: int, entry: "CallLine | StepLine") -> None:
        """Adds an entry."""
        self._all_made().insert(place, entry)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def _all_made(self) -> "list[CallLine | StepLine | None]":
        """The entries, from now on as in a list."""
        if not self._is_changed:
            self._entries = list(self)
            self._is_changed = True
        return self._entries


def columns_of(entries: "Iterable[CallLine | StepLine]") -> CallColumns:
    """Columns of the calls among some entries."""
    from pytest_msprobe.dump.capture import StepLine

    columns, step = CallColumns(), 0
    for entry in entries:
        if isinstance(entry, StepLine):
            step = entry.step
        else:
            columns.add(entry, step)
    return columns


def call_columns(entries: "MutableSequence[CallLine | StepLine]") -> CallColumns:
    """Columns of the calls of a capture."""
    return entries.columns() if isinstance(entries, CallTable) else columns_of(entries)
