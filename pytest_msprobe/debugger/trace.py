# SPDX-License-Identifier: Apache-2.0
"""Notes calls as they come, and knows sequences of calls that came before.

While the model runs, a call costs a few list operations: where it starts and ends, and
its values. Numbers, names and nesting follow from the sequence of starts and ends
alone, so they are worked out once for each sequence and kept in a tree of nodes; how
the values of a sequence are read is kept there too. Records are made when a step is
written.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from pytest_msprobe.debugger.measure import (
    PLAIN_TYPES,
    HeldMemory,
    storage_address,
)
from pytest_msprobe.debugger.raw import CallSite, Numbering, RawCall
from pytest_msprobe.model.calls import Frame, Phase, Tree

if TYPE_CHECKING:
    from pytest_msprobe.debugger.recipes import Recipe

# Where nobody replaces them.
_clone = torch._C.TensorBase.clone  # noqa: SLF001
_as_strided = torch._C.TensorBase.as_strided  # noqa: SLF001
# Larger tensors are read before they are written; of smaller ones a copy is kept.
_MOST_COPIED = {"cpu": 1 << 18, "cuda": 1 << 23}
# Between the elements of tensors that are copied together: so many for each of theirs.
_MOST_APART = 4
# So many sequences are remembered; where calls never repeat, memory stays bounded.
_MOST_NODES = 4096


class Mark:
    """That a call of a point ends: with a result, with none, or without being seen."""

    __slots__ = ("point", "way")

    def __init__(self, point: "Point", way: str) -> None:
        self.point = point
        self.way = way


class Defined(NamedTuple):
    """That memory which nobody had written is written now.

    Attributes:
        places: Of the values that lay there when they were noted.
    """

    places: tuple[int, ...]


class Kept(NamedTuple):
    """That copies were kept of tensors which are written now.

    Attributes:
        places: Of the values that lay there when they were noted.
    """

    places: tuple[int, ...]


class Point(Protocol):
    """Something whose calls are recorded."""

    @property
    def site(self) -> CallSite:
        """Name and numbering."""

    @property
    def module(self) -> torch.nn.Module | None:
        """The module, None for a function."""

    @property
    def marks(self) -> tuple[Mark, Mark, Mark]:
        """Its ends: with a result, with none, with an exception or unseen."""

    def start(self, numbering: Numbering) -> RawCall:
        """A numbered record of a call."""

    def adjust(self, call: RawCall) -> None:
        """Gives arguments the roles that the function knows."""


def marks_of(point: Point) -> tuple[Mark, Mark, Mark]:
    """Marks for a point."""
    return Mark(point, "result"), Mark(point, "none"), Mark(point, "failure")


def _is_copyable(tensor: torch.Tensor) -> bool:
    """Whether a copy is read as the tensor is."""
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return is_plain and not (
        tensor.requires_grad or tensor.is_quantized or tensor.is_nested
    )


def _copies(tensors: dict[int, Any]) -> dict[int, torch.Tensor]:
    """Copies of tensors in one storage, by the ids of those.

    What lies between the first and the last of their elements is copied at once, unless
    that is much more than they have.

    Args:
        tensors: By id.
    """
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
        if len(tensors) == 1:
            return {key: _clone(tensor) for key, tensor in tensors.items()}
        forms = [
            (key, tensor.shape, tensor.stride(), tensor.storage_offset())
            for key, tensor in tensors.items()
        ]
        first = min(offset for _, _, _, offset in forms)
        last = max(
            offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            for _, shape, strides, offset in forms
        )
        known = list(tensors.values())
        elements = [tensor.numel() for tensor in known]
        is_alike = len({tensor.dtype for tensor in known}) == 1 and all(elements)
        if not is_alike or last - first >= _MOST_APART * sum(elements):
            return {key: _clone(tensor) for key, tensor in tensors.items()}
        copy = _clone(_as_strided(known[0], (last - first + 1,), (1,), first))
        return {
            key: _as_strided(copy, shape, strides, offset - first)
            for key, shape, strides, offset in forms
        }


_NO_EVENTS = (tuple, Defined, Kept)
_NO_STARTS = (tuple, Defined, Kept, Mark)


class Event:
    """A call that starts or ends.

    Attributes:
        call: Its numbered record, without values.
        point: What is called.
        way: `start`, or that of the mark.
        names: Of arguments given by keyword, behind the positional ones.
        first: First of its values among those of the node.
        last: Behind the last of them.
    """

    __slots__ = ("call", "first", "last", "names", "point", "way")

    def __init__(self, call: RawCall, point: Point, way: str) -> None:
        self.call = call
        self.point = point
        self.way = way
        self.names: tuple[str, ...] = ()
        self.first = self.last = 0


class Node:
    """A sequence of starts and ends that came behind those of its parent.

    Attributes:
        events: What they were.
        following: Sequences that came next.
        points: What was called, in the order of starts.
        recipes: How its values were read, by phase and rows of the step.
        starts: Calls that had started by its end.
        unwritten: Places of values that lay in memory which nobody had written.
    """

    __slots__ = (
        "_numbering",
        "_open",
        "events",
        "following",
        "points",
        "recipes",
        "starts",
        "unwritten",
    )

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.following: dict[tuple[Any, ...], Node] = {}
        self.points: list[Point] = []
        self.recipes: dict[Any, Recipe] = {}
        self.starts = 0
        self.unwritten: set[int] = set()
        self._numbering = Numbering()
        # Calls that run at its end, those of functions included.
        self._open: list[Event] = []

    def next(self, keys: Sequence[Any], sizes: Sequence[int]) -> "Node":
        """The node of a sequence behind this one.

        Args:
            keys: Points where calls start, each followed by the names of its keyword
                arguments if there are any; marks where calls end; what was defined.
            sizes: How many values there are behind each start and end.
        """
        node = Node()
        node._numbering = numbering = self._numbering.copy()
        node._open = self._open.copy()
        node.starts = self.starts
        first = index = 0
        for key in keys:
            if type(key) is tuple:
                node.events[-1].names = key
                continue
            if type(key) is Defined:
                node.unwritten.update(key.places)
                continue
            if type(key) is Kept:
                continue
            event = node._event(key, numbering)
            event.first, event.last = first, sizes[index]
            first, index = sizes[index], index + 1
            node.events.append(event)
        return node

    def _event(self, key: Any, numbering: Numbering) -> Event:
        if type(key) is not Mark:
            event = Event(key.start(numbering), key, "start")
            self._open.append(event)
            self.points.append(key)
            self.starts += 1
            return event
        place = len(self._open) - 1
        while place >= 0 and self._open[place].point is not key.point:
            place -= 1
        if place < 0:  # it had started before anything was recorded
            unknown = RawCall(key.point.site, 0, 0)
            return Event(unknown, key.point, "failure")
        call = self._open[place].call
        del self._open[place:]
        if call.site.is_module:
            numbering.leave(call)
        return Event(call, key.point, key.way)


class Chunk:
    """What the calls of a node held.

    Attributes:
        node: The calls.
        phase: Part of the step in which they were.
        nodes: Trees of all values, None where they are kept by events.
        parameters: Of each event, those of the module that ended.
        trees: Inputs (positional, by keyword) or outputs of each event.
    """

    __slots__ = ("node", "nodes", "parameters", "phase", "trees")

    def __init__(self, node: Node, phase: Phase) -> None:
        self.node = node
        self.phase = phase
        self.nodes: list[Tree] | None = None
        self.parameters: Sequence[dict[str, Tree] | None] = ()
        self.trees: list[Any] = []

    def freeze(self) -> list[Any]:
        """Its trees by events; they may be changed."""
        nodes = self.nodes
        if nodes is not None:
            self.nodes = None
            for event in self.node.events:
                values = nodes[event.first : event.last]
                if event.way != "start":
                    self.trees.append(values)
                    continue
                given = len(values) - len(event.names)
                named = dict(zip(event.names, values[given:], strict=True))
                self.trees.append((values[:given], named))
        return self.trees

    def calls(self, running: dict[int, RawCall]) -> Iterator[RawCall]:
        """Records of the calls that ended.

        Args:
            running: Records of calls that have started, by the id of their template;
                changed.
        """
        trees = self.freeze()
        for event, tree, parameters in zip(
            self.node.events, trees, self.parameters, strict=True
        ):
            template = event.call
            if event.way == "start":
                call = RawCall(template.site, template.number, template.depth)
                call.key, call.parent = template.key, template.parent
                call.phase = self.phase
                call.stack = template.site.stacks.get(template.number)
                call.input_args, call.input_kwargs = tree
                running[id(template)] = call
                continue
            ended = running.pop(id(template), None)
            if ended is None:
                continue
            if event.way != "failure":
                ended.output, ended.parameters = tree, parameters
            yield ended


class Trace:
    """The log of the running step.

    Attributes:
        keys: As in `Node.next`, of what was noted since the log was taken.
        sizes: As there.
        values: Of those calls.
        next_start: Next call that is expected to start: the one of the last step.
        counted: Tensors whose bytes were counted, by id.
        counted_bytes: Of them all; those that tensors share count once.
        held: Memory that they hold.
    """

    __slots__ = (
        "_copied_bytes",
        "_expected",
        "_known",
        "_located",
        "_node",
        "_nodes",
        "_places",
        "_root",
        "_stacks",
        "_started",
        "counted",
        "counted_bytes",
        "held",
        "keys",
        "next_start",
        "sizes",
        "values",
    )

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.sizes: list[int] = []
        self.values: list[Any] = []
        # Places of the values that lie in a storage, and how many were looked at.
        self._places: dict[int, list[int]] = {}
        self._known = 0
        self._located: dict[int, int] = {}  # storages by the ids of values
        self._copied_bytes = 0
        self.counted: set[int] = set()
        self.counted_bytes = 0
        self.held = HeldMemory()
        self._root = self._node = Node()
        self._nodes = 0
        self._expected: list[Point] = []
        self._started: list[Point] = []
        self._stacks: dict[int, tuple[Frame, ...]] = {}
        self.next_start: Callable[[], Any] = repeat(None).__next__

    def begin_step(self) -> None:
        """Nothing has been called yet."""
        self.clear()
        if self._nodes > _MOST_NODES:
            self._root, self._nodes = Node(), 0
        self._node = self._root
        self._expected, self._started = self._started, []
        self._stacks.clear()
        self.next_start = chain(self._expected, repeat(None)).__next__

    def clear(self) -> None:
        """Forgets what was noted."""
        self.keys, self.sizes, self.values = [], [], []
        if self._known:
            self._places, self._located = {}, {}
            self._known = self._copied_bytes = 0
        if self.counted:
            self.counted, self.counted_bytes = set(), 0
            self.held.clear()

    def holds(self, storage: int) -> bool:
        """Whether a value that was noted lies in a storage.

        Args:
            storage: Its first byte.
        """
        places, located, values = self._places, self._located, self.values
        for place in range(self._known, len(values)):
            value = values[place]
            if type(value) not in PLAIN_TYPES:
                continue
            key = id(value)
            own = located.get(key)
            if own is None:
                own = located[key] = storage_address(value)
            held = places.get(own)
            if held is None:
                places[own] = [place]
            else:
                held.append(place)
        self._known = len(values)
        return storage in places

    def define(self, storage: int) -> bool:
        """Notes that a storage which nobody had written is written now.

        Args:
            storage: Its first byte; it is held.

        Returns:
            Whether that could be noted: what a module returned was written before.
        """
        places = tuple(self._places[storage])
        keys: list[Any] | None = None
        for place in places:
            event = bisect_right(self.sizes, place)
            if keys is None:
                if event == len(self.sizes) - 1 and type(self._last_event) is not Mark:
                    break  # the call that has just started: so do all others
                keys = [k for k in self.keys if type(k) not in _NO_EVENTS]
            if type(keys[event]) is Mark and keys[event].point.module is not None:
                return False
        del self._places[storage]  # their numbers are not asked for
        self.keys.append(Defined(places))
        return True

    def keep(self, storage: int, most_bytes: int) -> bool:
        """Keeps copies of the tensors in a storage that is about to be written.

        Args:
            storage: Its first byte; it is held.
            most_bytes: Of all copies.

        Returns:
            Whether that could be done; else they have to be read now.
        """
        places, values = self._places[storage], self.values
        whole = values[places[0]]
        tensors = {id(whole): whole}
        for place in places:
            tensors[id(values[place])] = values[place]
        if len(tensors) > 1:
            whole = max(tensors.values(), key=torch.Tensor.numel)
        size = whole.numel() * whole.element_size() * len(tensors)
        self._copied_bytes += size
        limit = _MOST_COPIED.get(whole.device.type, 0)
        if size > limit or self._copied_bytes > most_bytes:
            return False
        if not all(map(_is_copyable, tensors.values())):
            return False
        copies = _copies(tensors)
        del self._places[storage]
        if self.counted:
            self.counted -= copies.keys()
            self.held.drop(storage)
        self.keys.append(Kept(tuple(places)))
        if len(copies) == 1:
            copy = copies[id(whole)]
            for place in places:
                values[place] = copy
            self._located.pop(id(whole), None)
            self._places[storage_address(copy)] = places
            return True
        for place in places:
            values[place] = copies[id(values[place])]
        for key, copy in copies.items():
            self._located.pop(key, None)
            self._places[storage_address(copy)] = []
        for place in places:
            self._places[storage_address(values[place])].append(place)
        return True

    @property
    def _last_event(self) -> Any:
        return next(k for k in reversed(self.keys) if type(k) not in _NO_EVENTS)

    def add_stack(self, stack: tuple[Frame, ...]) -> None:
        """The stack of a call that starts and was not expected."""
        number = sum(type(key) not in _NO_STARTS for key in self.keys)
        self._stacks[len(self._started) + number] = stack
        self.next_start = repeat(None).__next__

    def take(self) -> tuple[Node, list[Any]]:
        """The sequence noted since the last time, and its values."""
        keys, sizes, values = self.keys, self.sizes, self.values
        self.clear()
        before = self._node
        key = (*keys, *sizes)
        node = before.following.get(key)
        if node is None:
            node = before.next(keys, sizes)
            before.following[key] = node
            self._nodes += 1
        self._node = node
        if self._stacks:
            starts = (event.call for event in node.events if event.way == "start")
            for place, call in enumerate(starts, before.starts):
                stack = self._stacks.get(place)
                if stack is not None:
                    call.site.stacks.setdefault(call.number, stack)
        self._started += node.points
        return node, values
