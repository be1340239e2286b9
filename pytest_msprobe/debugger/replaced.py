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
from torch.overrides import TorchFunctionMode

from pytest_msprobe.debugger.callers import Callers
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.functions import (
    Action,
    Entry,
    FunctionTable,
    call_unrecorded,
    operator_site,
    record_call,
)
from pytest_msprobe.debugger.writes import NAMESPACES, WriteBarriers

_MISSING = object()
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
        self._originals: list[tuple[Any, str, Any]] = []
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
            self._put(owner, name, self._replacement(function, entry))
        for kind in _PACKETS:
            self._put(kind, "__call__", self._dispatcher(kind.__call__))
        self._barriers.install(but=known, has_operators=False)

    def remove(self) -> None:
        """Puts the originals back."""
        self._barriers.remove()
        for owner, name, original in reversed(self._originals):
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._originals.clear()

    def _put(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, function)

    def _replacement(
        self, original: Callable[..., Any], entry: Entry
    ) -> Callable[..., Any]:
        collector, identify = self._collector, threading.get_ident
        is_off: Callable[[], bool] = torch._C._is_torch_function_all_disabled  # noqa: SLF001
        inner = self._shielded(original) if entry.is_python else original

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            if (
                not collector.is_recording
                or self._is_inside
                or identify() != collector.thread
                or is_off()
            ):
                return original(*args, **kwargs)
            frame = sys._getframe(1)  # noqa: SLF001 - the caller decides the name
            return self._call(entry, original, inner, args, kwargs, frame)

        return function

    def _dispatcher(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The call of any operator."""
        collector, identify = self._collector, threading.get_ident
        is_off: Callable[[], bool] = torch._C._is_torch_function_all_disabled  # noqa: SLF001
        known, lookup = self._table.known, self._table.lookup

        @functools.wraps(original)
        def call(packet: Any, /, *args: Any, **kwargs: Any) -> Any:
            if (
                not collector.is_recording
                or self._is_inside
                or identify() != collector.thread
                or is_off()
            ):
                return original(packet, *args, **kwargs)
            entry = known.get(packet) or lookup(packet)
            operator = functools.partial(original, packet)
            if entry.is_passed and not kwargs:
                return operator(*args)
            inner = self._shielded(operator) if entry.is_python else operator
            frame = sys._getframe(1)  # noqa: SLF001 - where stacks start
            return self._call(entry, operator, inner, args, kwargs, frame)

        return call

    def _shielded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function of which nothing inside is recorded."""

        @functools.wraps(original)
        def shielded(*args: Any, **kwargs: Any) -> Any:
            self._is_inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._is_inside = False

        return shielded

    def _call(
        self,
        entry: Entry,
        original: Callable[..., Any],
        inner: Callable[..., Any],
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
    current = ""

    class Probe(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            del types
            seen.setdefault(current, func)
            return func(*args, **(kwargs or {}))

    for name in names:
        method = getattr(torch.Tensor, name, None)
        if method is None:
            continue
        current = name
        for sample in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64)):
            with Probe():
                try:
                    method(sample, sample)
                except (TypeError, RuntimeError):
                    try:
                        method(sample)
                    except (TypeError, RuntimeError):
                        continue
            break
    return seen
