# SPDX-License-Identifier: Apache-2.0
"""Level L0: calls that write into tensors are met before they do.

No function mode runs at L0, because it would cost more than everything else. Instead
the functions that can write are replaced for the time of a capture: torch's in-place
methods, its functions that take `out=`, and the operators whose schemas mark a write
or that return nothing.
"""

import functools
import sys
import threading
from collections.abc import Callable, Container, Iterator
from types import ModuleType
from typing import Any

import torch

from pytest_msprobe.debugger.collector import Collector

NAMESPACES: tuple[Any, ...] = (
    torch,
    torch._C._nn,  # noqa: SLF001 - where torch.nn.functional finds its functions
    torch.nn.functional,
    torch.linalg,
    torch.special,
    torch.fft,
)
_PREFIXES = ("", "linalg_", "special_", "fft_")
# They end in an underscore and write no elements.
_HARMLESS = frozenset(("requires_grad_", "share_memory_", "retain_grad_", "rename_"))
_ALLOCATORS = ("empty", "empty_like", "empty_strided")
_MISSING = object()

# What a call with these arguments writes.
_Written = Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]
_Replaced = tuple[Any, str, _Written]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """An in-place call writes its first argument."""
    return [args[0], *_out(args, kwargs)] if args else list(kwargs.values())


def _out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """A call writes what it is given as `out`, if anything."""
    del args
    out = kwargs.get("out")
    if out is None:
        return []
    return list(out) if isinstance(out, list | tuple) else [out]


def _marked(positions: tuple[int, ...], names: tuple[str, ...]) -> _Written:
    """An operator writes the arguments that its schemas mark."""

    def written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        found = [args[i] for i in positions if i < len(args)]
        if kwargs:
            found += [kwargs[name] for name in names if name in kwargs]
        return found

    return written


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """An operator that returns nothing and marks nothing may write everything."""
    return [*args, *kwargs.values()]


@functools.cache
def marked_arguments(name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of the arguments that a function of torch writes.

    Args:
        name: Of an in-place function; its first argument where torch has no operator
            of this name.
    """
    packet = getattr(torch.ops.aten, name, None)
    positions: set[int] = set()
    names: dict[str, None] = {}
    for overload in packet.overloads() if packet is not None else ():
        for index, argument in enumerate(getattr(packet, overload)._schema.arguments):  # noqa: SLF001
            if argument.alias_info is not None and argument.alias_info.is_write:
                positions.add(index)
                names[argument.name] = None
    return tuple(sorted(positions)) or (0,), tuple(names)


def is_in_place(name: str) -> bool:
    """Whether a function of this name writes arguments, by torch's convention."""
    return name.endswith("_") and not name.endswith("__")


class Replacements:
    """Functions put in place of others, in modules and classes."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Replaces an attribute."""
        self._originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, function)

    def remove(self) -> None:
        """Puts the originals back; what was inherited is inherited again."""
        for owner, name, original in reversed(self._originals):
            if original is not _MISSING:
                setattr(owner, name, original)
            elif name in vars(owner):
                delattr(owner, name)
        self._originals.clear()


class WriteBarriers:
    """Replaces the functions that write and puts them back."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._replacements = Replacements()

    def install(
        self,
        *,
        but: Container[tuple[int, str]] = (),
        has_operators: bool = True,
    ) -> None:
        """Replaces them.

        Args:
            but: Ids of owners and names that are left as they are.
            has_operators: Whether operators that write are replaced, too.
        """
        for owner, name, written in _torch_writers():
            if (id(owner), name) not in but:
                self._replace(owner, name, written)
        for owner, name, written in _operators() if has_operators else ():
            self._replace(owner, name, written)

    def remove(self) -> None:
        """Puts the originals back."""
        self._replacements.remove()

    def _replace(
        self,
        owner: Any,
        name: str,
        written: _Written,
    ) -> None:
        original = getattr(owner, name)
        collector, identify = self._collector, threading.get_ident

        @functools.wraps(original)
        def barrier(*args: Any, **kwargs: Any) -> Any:
            if collector.is_recording and identify() == collector.thread:
                try:
                    for tensor in _tensors(written(args, kwargs)):
                        collector.before_write(tensor)
                except Exception as error:  # noqa: BLE001 - never into the model
                    collector.fail(error)
            return original(*args, **kwargs)

        @functools.wraps(original)
        def out_barrier(*args: Any, **kwargs: Any) -> Any:
            if "out" in kwargs:
                return barrier(*args, **kwargs)
            return original(*args, **kwargs)

        replacement = out_barrier if written is _out else barrier
        self._replacements.put(owner, name, replacement)


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    if all(type(value) is torch.Tensor for value in values):
        return values
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(list(value))
    return found


@functools.cache
def _torch_writers() -> list[_Replaced]:
    """Functions of torch itself that write."""
    found: list[_Replaced] = []
    for name in dir(torch.Tensor):
        is_augmented = name.startswith("__i") and name.endswith("__")
        writes = is_in_place(name) and not name.startswith("_")
        if name in _HARMLESS or not (is_augmented or writes):
            continue
        if is_augmented and not hasattr(torch.Tensor, f"__{name[3:]}"):
            continue  # __init__, __index__, __invert__ and the like
        found.append((torch.Tensor, name, _first))
    found.append((torch.Tensor, "__setitem__", _first))
    with_out = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()  # noqa: SLF001 - no other access
        if schema.name.startswith("aten::")
        and any(argument.name == "out" for argument in schema.arguments)
    }
    for owner in NAMESPACES:
        for name, function in vars(owner).items():
            if not callable(function) or isinstance(function, ModuleType | type):
                continue
            if is_in_place(name):
                written: _Written = _first
                if name.startswith("_"):  # over lists, and several of them
                    written = _marked(*marked_arguments(name))
                found.append((owner, name, written))
            elif name in _ALLOCATORS:
                continue  # what they are given as out is made anew
            elif any(prefix + name in with_out for prefix in _PREFIXES):
                found.append((owner, name, _out))
    return found


def _operators() -> Iterator[_Replaced]:
    """Operators that were registered by others and write."""
    packets: dict[str, tuple[set[int], set[str], bool]] = {}
    for schema in torch._C._jit_get_all_schemas():  # noqa: SLF001 - no other access
        if schema.name.startswith(("aten::", "prim::", "prims::")):
            continue
        positions, names, is_silent = packets.get(schema.name, (set(), set(), True))
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                positions.add(index)
                names.add(argument.name)
        is_silent = is_silent and not schema.returns
        packets[schema.name] = (positions, names, is_silent)
    for full, (positions, names, is_silent) in packets.items():
        if not positions and not is_silent:
            continue
        written: _Written = _all
        if positions:
            written = _marked(tuple(sorted(positions)), tuple(sorted(names)))
        namespace, name = full.split("::", 1)
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None:
            continue
        yield packet, "_op", written
        for overload in packet.overloads():
            yield getattr(packet, overload), "_op", written


class TritonWatch:
    """Meets launches of Triton kernels, which may write anything, at every level."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._hooks: Any = None

    def install(self) -> None:
        """Watches from now on, where Triton is in use."""
        knobs = sys.modules.get("triton.knobs")
        runtime = getattr(knobs, "runtime", None)
        hooks: Any = getattr(runtime, "launch_enter_hook", None)
        if hasattr(hooks, "add") and hasattr(hooks, "remove"):
            self._hooks = hooks
            hooks.add(self._launch)

    def remove(self) -> None:
        """Watches no more."""
        if self._hooks is not None:
            self._hooks.remove(self._launch)
            self._hooks = None

    def _launch(self, *_metadata: Any) -> None:
        collector = self._collector
        if collector.measurer.is_launching or not collector.is_recording:
            return
        if threading.get_ident() == collector.thread:
            collector.before_any_write()
