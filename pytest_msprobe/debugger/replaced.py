# SPDX-License-Identifier: Apache-2.0
"""Level L1 without a function mode: functions are replaced for the time of a capture.

A mode is asked about every attribute and view of a tensor as well, which costs more
than the calls that are recorded. What a mode would record is replaced here where torch
keeps it: in its modules, on `torch.Tensor` and, for operators, in the class of all of
them. A function that somebody imported by name before is not met.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

import torch

from pytest_msprobe.debugger.callers import Callers
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.functions import (
    Action,
    Entry,
    FunctionTable,
    call_unrecorded,
    functions_told,
    operator_site,
    record_call,
)
from pytest_msprobe.debugger.writes import NAMESPACES, Replacements, WriteBarriers

_PACKETS: tuple[Any, ...] = (torch._ops.OpOverloadPacket, torch._ops.OpOverload)  # noqa: SLF001
# Methods of operators, whose functions a mode sees under another name.
_BINARY = (
    "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
)
_OTHERS = "eq ne lt le gt ge neg pos invert abs"


class ReplacedFunctions:
    """Replaces what a function mode would record, and puts it back."""

    def __init__(self, collector: Collector, table: FunctionTable) -> None:
        self._collector = collector
        self._table = table
        self._callers = Callers()
        self._barriers = WriteBarriers(collector)
        self._replacements = Replacements()
        # Whether a function in Python runs, of which only itself is recorded.
        self._is_inside = False

    def install(self) -> None:
        """Replaces them."""
        known: set[tuple[int, str]] = set()
        for owner, name, function, seen in _functions():
            entry = self._table.lookup(seen)
            sites = (entry.site, entry.operator_site, entry.unary_site)
            if entry.action is Action.PASS and not any(sites):
                continue
            known.add((id(owner), name))
            self._replacements.put(owner, name, self._replacement(function, entry))
        for kind in _PACKETS:
            self._replacements.put(kind, "__call__", self._dispatcher(kind.__call__))
        self._barriers.install(but=known, has_operators=False)

    def remove(self) -> None:
        """Puts the originals back."""
        self._barriers.remove()
        self._replacements.remove()

    def _is_passed(self) -> bool:
        """Whether a call that is made now is none of those to be recorded."""
        collector = self._collector
        return (
            not collector.is_recording
            or self._is_inside
            or threading.get_ident() != collector.thread
            or torch._C._is_torch_function_all_disabled()  # noqa: SLF001 - no other access
        )

    def _replacement(
        self, original: Callable[..., Any], entry: Entry
    ) -> Callable[..., Any]:
        is_passed, call = self._is_passed, self._call

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            if is_passed():
                return original(*args, **kwargs)
            frame = sys._getframe(1)  # noqa: SLF001 - the caller decides the name
            return call(entry, original, args, kwargs, frame)

        return function

    def _dispatcher(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The call of any operator."""
        is_passed, lookup = self._is_passed, self._table.lookup

        @functools.wraps(original)
        def call(packet: Any, /, *args: Any, **kwargs: Any) -> Any:
            if is_passed():
                return original(packet, *args, **kwargs)
            entry = lookup(packet)
            if entry.is_passed and not kwargs:
                return original(packet, *args)
            frame = sys._getframe(1)  # noqa: SLF001 - where stacks start
            operator = functools.partial(original, packet)
            return self._call(entry, operator, args, kwargs, frame)

        return call

    def _shield(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a function of which nothing inside is recorded."""
        self._is_inside = True
        try:
            return function(*args, **kwargs)
        finally:
            self._is_inside = False

    def _call(
        self,
        entry: Entry,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        site = entry.site
        if not entry.is_named_alike:
            if entry.inner is not None and (
                site is None or self._callers.place(frame).is_operator
            ):
                return original(*args, **kwargs)  # what it calls is met
            site = operator_site(self._callers, self._table, entry, frame, args)
        inner = original
        if entry.is_python:
            inner = functools.partial(self._shield, original)
        if site is None:
            return call_unrecorded(self._collector, entry, inner, args, kwargs)
        return record_call(self._collector, entry, site, inner, args, kwargs, frame)


def _functions() -> Iterator[tuple[Any, str, Callable[..., Any], Any]]:
    """Owner, name and function of what may be replaced, and what a mode is told."""
    for owner in NAMESPACES:
        for name, function in list(vars(owner).items()):
            if callable(function) and not isinstance(function, ModuleType | type):
                yield owner, name, function, function
    operators = _operator_methods()
    for name in dir(torch.Tensor):
        function = getattr(torch.Tensor, name)
        if name in operators:
            yield torch.Tensor, name, function, operators[name]
        elif name == "__setitem__" or _is_method(name, function):
            yield torch.Tensor, name, function, function


def _is_method(name: str, function: Any) -> bool:
    is_function = callable(function) and not isinstance(function, type)
    return is_function and not name.startswith("__")


@functools.cache
def _operator_methods() -> dict[str, Any]:
    """What a mode is told of the methods behind operators, found by trying."""
    names = [f"__{way}{name}__" for name in _BINARY for way in ("", "r", "i")]
    names += [f"__{name}__" for name in _OTHERS.split()]
    seen: dict[str, Any] = {}
    for name in names:
        method = getattr(torch.Tensor, name, None)
        if method is None:
            continue
        samples = (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64))
        for given in ((x,) * count for x in samples for count in (2, 1)):
            told, has_ended = functions_told(method, *given)
            if told:
                seen.setdefault(name, told[0])
            if has_ended:
                break
    return seen
