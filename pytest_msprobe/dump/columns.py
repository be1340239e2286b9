# SPDX-License-Identifier: Apache-2.0
"""The tensors of a capture as columns of numbers: what judging works with.

A file is turned into columns while it is read, when every line is at hand anyway; most
lines are then never looked at again. One that is asked for is made again.
"""

import math
from collections.abc import Callable, Iterator, KeysView, MutableMapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import ne
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pytest_msprobe.dump.capture import TensorLine

_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
# Float types have maximum, minimum, sum and sum of squares, integers the first two.
_WITH_SUMS = 4
_METRICS = 5
# So many lines are turned into columns at once: they fit into the processor's cache.
_CHUNK = 1024


@dataclass(slots=True)
class Columns:
    """Numbers of some `t` lines.

    Attributes:
        count: Elements.
        high: Largest finite element, NaN where there is none.
        low: Smallest.
        total: Sum, NaN for integer types.
        squares: Sum of squares, NaN for integer types.
        nonfinite: (n, 3) counts of NaN, +Inf, -Inf.
        has_sums: Whether the type has sums and a sketch: floats and complex.
        scales: Scale of each 16-bit sketch, else NaN.
        noise: (n, 5) the golden's noise by metric, 0 where it has none.
        codes: Element types.
        shapes: Shapes.
        classes: Codes of row classes.
        segments: Segments.
        checksums: Checksums.
        sketches: Sketches in base 85, empty where there is none.
    """

    count: _F64
    high: _F64
    low: _F64
    total: _F64
    squares: _F64
    nonfinite: _I64
    has_sums: _Bools
    scales: _F64
    noise: _F64
    codes: list[str]
    shapes: list[list[int]]
    classes: list[str]
    segments: list[str]
    checksums: list[str]
    sketches: list[str]

    def at(self, index: _I64) -> "Columns":
        """The columns of some lines."""
        if np.array_equal(index, np.arange(len(self.codes))):
            return self
        places = index.tolist()

        def chosen(column: Any) -> Any:
            if isinstance(column, list):
                return [column[place] for place in places]
            return column[index]

        return Columns(*(chosen(getattr(self, field.name)) for field in fields(self)))


def columns_of(tensors: Sequence["TensorLine"]) -> Columns:
    """Numbers of `t` lines as columns."""
    size = len(tensors)
    values = [t.v for t in tensors]
    lengths = np.fromiter(map(len, values), np.int64, size)
    has_sums = lengths == _WITH_SUMS
    if not has_sums.all():
        padding = (None, None)
        values = [v if len(v) == _WITH_SUMS else [*v, *padding] for v in values]
    numbers = np.array(list(chain.from_iterable(values)), dtype=np.float64)
    numbers = numbers.reshape(size, _WITH_SUMS)
    shapes = [t.s for t in tensors]
    return Columns(
        np.fromiter(map(math.prod, shapes), np.float64, size),
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2],
        numbers[:, 3],
        _sparse([t.x for t in tensors], 3, np.int64),
        has_sums,
        np.array([t.a for t in tensors], dtype=np.float64),
        _sparse([t.n for t in tensors], _METRICS, np.float64),
        [t.d for t in tensors],
        shapes,
        [t.k for t in tensors],
        [t.g for t in tensors],
        [t.c for t in tensors],
        [t.q for t in tensors],
    )


def _sparse(rows: list[Any], width: int, dtype: Any) -> Any:
    """Numbers of which most lines have none: (n, width), 0 for those."""
    result = np.zeros((len(rows), width), dtype=dtype)
    if any(rows):
        for place, row in enumerate(rows):
            if row:
                result[place] = row
    return result


def _joined(parts: list[Columns]) -> Columns:
    """Columns one behind the other."""

    def column(name: str) -> Any:
        pieces = [getattr(part, name) for part in parts]
        if isinstance(pieces[0], list):
            return list(chain.from_iterable(pieces))
        return np.concatenate(pieces)

    return Columns(*(column(field.name) for field in fields(Columns)))


def differs(old: Sequence[object], new: Sequence[object]) -> _Bools:
    """Where two columns of any values differ."""
    return np.fromiter(map(ne, old, new), np.bool_, len(old))


class TensorTable(MutableMapping[int, "TensorLine"]):
    """Tensors of a file by id: columns, and lines that are made when asked for.

    Lines may be changed, replaced and removed as in a dict: the columns follow.
    """

    def __init__(self, decode: Callable[[bytes], "TensorLine"]) -> None:
        """An empty table.

        Args:
            decode: Makes a line from its bytes in the file.
        """
        self._decode = decode
        self._bytes: dict[int, bytes] = {}
        self._made: dict[int, TensorLine] = {}
        self._waiting: list[TensorLine] = []
        self._parts: list[Columns] = []
        self._is_changed = False
        # Texts and shapes that many lines have are kept once.
        self._texts: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], list[int]] = {}

    def add(self, content: bytes, line: "TensorLine") -> None:
        """The next line of the file, with an id of its own.

        Args:
            content: Its bytes.
            line: The same, decoded; its numbers are kept and it itself is not.
        """
        self._bytes[line.t] = content
        line.g = self._texts.setdefault(line.g, line.g)
        line.d = self._texts.setdefault(line.d, line.d)
        line.s = self._shapes.setdefault(tuple(line.s), line.s)
        self._waiting.append(line)
        if len(self._waiting) == _CHUNK:
            self._settle()

    def _settle(self) -> None:
        self._parts.append(columns_of(self._waiting))
        self._waiting = []

    def columns(self) -> Columns:
        """Columns of all lines, in the order of the table."""
        if self._is_changed or any(
            line != self._decode(self._bytes[number])
            for number, line in self._made.items()
        ):
            return columns_of(list(self.values()))
        if self._waiting or not self._parts:
            self._settle()
        if len(self._parts) > 1:
            self._parts = [_joined(self._parts)]
        return self._parts[0]

    def __getitem__(self, number: int) -> "TensorLine":
        """The line of a tensor."""
        line = self._made.get(number)
        if line is None:
            line = self._made[number] = self._decode(self._bytes[number])
        return line

    def __setitem__(self, number: int, line: "TensorLine") -> None:
        """Puts a line in place of one of the file, or adds one."""
        self._is_changed = True
        self._bytes.setdefault(number, b"")
        self._made[number] = line

    def __delitem__(self, number: int) -> None:
        """Removes a line."""
        del self._bytes[number]
        self._made.pop(number, None)
        self._is_changed = True

    def __contains__(self, number: object) -> bool:
        """Whether a tensor has this id."""
        return number in self._bytes

    def __iter__(self) -> Iterator[int]:
        """Ids in the order of the file."""
        return iter(self._bytes)

    def keys(self) -> KeysView[int]:
        """Ids; asking whether one is among them costs no call of Python."""
        return self._bytes.keys()

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._bytes)


def table_columns(tensors: MutableMapping[int, "TensorLine"]) -> Columns:
    """Columns of all tensors of a capture, in their order."""
    if isinstance(tensors, TensorTable):
        return tensors.columns()
    return columns_of(list(tensors.values()))
