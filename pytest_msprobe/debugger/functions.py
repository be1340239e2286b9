# SPDX-License-Identifier: Apache-2.0
"""Level L1: a torch function mode sees the calls of torch and of every operator.

Which calls become rows, and under which name, is decided once per function and kept in
a table: functions of the list file, operators of every namespace; everything else is
passed through, except that allocations and writes are noted for the roles of slots.
"""

import functools
import importlib
import importlib.util
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

import torch
import yaml
from torch.overrides import TorchFunctionMode

from pytest_msprobe.debugger.callers import Callers
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.measure import Measured, with_role
from pytest_msprobe.debugger.raw import CallSite, Numbering, RawCall
from pytest_msprobe.debugger.trace import marks_of
from pytest_msprobe.debugger.writes import (
    Replacements,
    is_in_place,
    marked_arguments,
)
from pytest_msprobe.errors import ConfigError
from pytest_msprobe.model.calls import Role, TensorValue, Tree

LIST_FILE = Path(__file__).with_name("support_wrap_ops.yaml")

_GROUPS: dict[str, tuple[str, str]] = {
    # group: prefix, where the functions live
    "functional": ("Functional", "torch.nn.functional"),
    "tensor": ("Tensor", "torch.Tensor"),
    "torch": ("Torch", "torch"),
    "_VF": ("VF", "torch._VF"),
    "distributed": ("Distributed", "torch.distributed"),
}
_IGNORED_GROUPS = ("aten", "torch_npu", "npu_distributed", "mindspeed")
_ALLOCATORS = (
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
)
# Arguments that hold no numbers, by the name in the operator's schema.
_HANDLE = re.compile(
    r"(^|_)(ptrs?|pointers?|handles?|handler(_tensor)?|workspace|scratch|"
    r"semaphores?|barrier|locks?)$"
)
_CACHE = re.compile(r"(^|_)(kv_?cache|key_cache|value_cache|k_cache|v_cache)s?$")

_OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift "
        "eq ne lt le gt ge iadd isub imul itruediv ifloordiv imod ipow iand ior ixor "
        "ilshift irshift"
    ).split()
}
_C_FUNCTIONS = (
    BuiltinFunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)

# Functions of torch in Python that hand their work to one operator, and the keyword
# arguments by which they write into what they are given.
_QUIET = frozenset(
    (
        "celu cross_entropy dropout einsum elu embedding glu group_norm hardsigmoid "
        "hardswish hardtanh layer_norm leaky_relu log_softmax mish mse_loss norm "
        "normalize pad relu relu6 rms_norm selu sigmoid silu softmax softsign split "
        "tanh unique"
    ).split()
)
_WRITING = ("inplace", "max_norm")

# All functions that choose between two by a flag share one code.
_CHOICE = torch.nn.functional.max_pool2d.__code__


class Action(Enum):
    """What is done with the calls of a function."""

    PASS = 0
    ALLOCATE = 1
    WRITE = 2
    RECORD = 3


class FunctionPoint:
    """A function under one name.

    Attributes:
        site: The name.
        marks: Ends of its calls.
    """

    __slots__ = ("_entry", "marks", "site")

    module = None

    def __init__(self, site: CallSite, entry: "Entry") -> None:
        self.site = site
        self._entry = entry
        self.marks = marks_of(self)

    def start(self, numbering: Numbering) -> RawCall:
        """A numbered record of a call."""
        return numbering.begin(self.site)

    def adjust(self, call: RawCall) -> None:
        """Arguments that hold no numbers, and what `out=` held, are not judged."""
        if self._entry.opaque or "out" in call.input_kwargs:
            _set_roles(call, entry=self._entry)


@dataclass(slots=True)
class Entry:
    """What is known of one function.

    Attributes:
        action: What is done with its calls.
        site: Name and numbering of its calls, None where they are not recorded.
        operator_site: The same for calls made by an operator (`a + b`).
        unary_site: The same for calls made by a unary operator (`-a`).
        dispatch_site: The same for calls made by a function that only chooses between
            two by a flag (`max_pool2d` with `return_indices`).
        inner: What the function does behind its question to torch.overrides: run under
            the mode where calls of the function itself are not recorded.
        code: Of a function in Python, whose arguments torch hands to a mode in
            another form than the caller's.
        parameters: Names of its parameters.
        positions: Positional arguments that it writes.
        names: Keyword arguments that it writes.
        writes_unmarked: It returns nothing and marks nothing, so it may write all.
        opaque: Positions and names of arguments that hold no numbers.
        is_python: It may run Python code, whose writes the mode does not see.
        is_quiet: That code is torch's and writes nothing, but for its arguments `out`,
            `inplace` and `max_norm`.
        is_marked: Of what was there before it writes what its schema marks, no more.
        points: It under each of its names.
        is_passed: Nothing is done with its calls, where they have no keyword arguments.
        is_named_alike: All of its calls have one name.
        is_simple: And arguments as the caller wrote them.
    """

    action: Action
    site: CallSite | None = None
    operator_site: CallSite | None = None
    unary_site: CallSite | None = None
    dispatch_site: CallSite | None = None
    inner: Callable[..., Any] | None = None
    code: CodeType | None = None
    parameters: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    writes_unmarked: bool = False
    opaque: tuple[int | str, ...] = ()
    is_python: bool = False
    is_quiet: bool = False
    is_marked: bool = False
    points: dict[CallSite, FunctionPoint] = field(default_factory=dict)
    is_passed: bool = False
    is_named_alike: bool = False
    is_simple: bool = False

    def runs_unseen(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call may write where the mode does not see it.

        Args:
            kwargs: Its keyword arguments.
        """
        if self.is_quiet:
            return any(kwargs.get(name) for name in _WRITING)
        return self.is_python

    def settle(self) -> None:
        """Works out what follows from the rest."""
        others = (self.operator_site, self.unary_site, self.dispatch_site, self.inner)
        has_one_name = all(other is None for other in others)
        is_nothing = self.action is Action.PASS and not self.is_python
        self.is_passed = has_one_name and self.site is None and is_nothing
        self.is_named_alike = has_one_name
        self.is_simple = has_one_name and self.site is not None and self.code is None

    def point(self, site: CallSite) -> FunctionPoint:
        """The function under a name."""
        point = self.points.get(site)
        if point is None:
            point = self.points[site] = FunctionPoint(site, self)
        return point


def read_op_list(path: Path | None) -> dict[str, list[str]]:
    """Reads a list file: groups of function names.

    Args:
        path: A user's file, None for the packaged one.

    Raises:
        ConfigError: The file cannot be read or has another form.
    """
    source = path or LIST_FILE
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        message = f"{source}: cannot be read as a list of APIs ({error})"
        raise ConfigError(message.replace("\n", " "), slug="op-list") from error
    if not isinstance(data, dict):
        message = f"{source}: expected groups of API names"
        raise ConfigError(message, slug="op-list")
    for group, names in data.items():
        is_list = isinstance(names, list) and all(isinstance(n, str) for n in names)
        if group in _IGNORED_GROUPS:
            continue
        if group not in _GROUPS and "." not in str(group) and not _importable(group):
            known = ", ".join(_GROUPS)
            message = f"{source}: {group}: expected one of {known} or a module"
            raise ConfigError(message, slug="op-list")
        if names is not None and not is_list:
            message = f"{source}: {group}: expected a list of names"
            raise ConfigError(message, slug="op-list")
    return {str(group): list(names or []) for group, names in data.items()}


def _importable(name: object) -> bool:
    return isinstance(name, str) and (
        name in sys.modules or importlib.util.find_spec(name) is not None
    )


def _resolve(owner: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            return None
    return owner


def _owner(group: str) -> Any:
    place = _GROUPS[group][1] if group in _GROUPS else group
    if place == "torch.Tensor":
        return torch.Tensor
    try:
        return importlib.import_module(place)
    except ImportError:
        return _resolve(torch, place.removeprefix("torch."))


def functions_told(call: Any, *args: Any) -> tuple[list[Any], bool]:
    """What a function mode is told while a call runs, and whether it came to its end.

    Args:
        call: May raise TypeError or RuntimeError.
        args: Its arguments.
    """
    told: list[Any] = []

    class Probe(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            del types
            told.append(func)
            return func(*args, **(kwargs or {}))

    with Probe():
        try:
            call(*args)
        except (TypeError, RuntimeError):
            return told, False
    return told, True


@functools.cache
def operator_functions() -> dict[Any, tuple[str, ...]]:
    """Which function a mode sees for each Python operator, found by trying."""
    seen: dict[Any, list[str]] = {}
    for name, function in _OPERATORS.items():
        sample = torch.ones(2, 2) if "matmul" in name or "truediv" in name else None
        left = sample if sample is not None else torch.ones(2, 2, dtype=torch.int64)
        for told in functions_told(function, left, left)[0]:
            seen.setdefault(told, []).append(name)
    return {function: tuple(names) for function, names in seen.items()}


class FunctionTable:
    """What to do with each function, decided once.

    Attributes:
        unseen: Listed functions that a mode does not see: owner, name, entry.
        known: What was looked up so far.
    """

    def __init__(
        self,
        collector: Collector,
        op_list: dict[str, list[str]],
        namespaces: Iterable[str],
    ) -> None:
        self._collector = collector
        self._namespaces = frozenset(namespaces)
        self._entries: dict[Any, Entry] = {}
        self.known: dict[Any, Entry] = {}
        self.unseen: list[tuple[Any, str, Entry]] = []
        for group, names in op_list.items():
            if group not in _IGNORED_GROUPS:
                self._add_group(group, names)
        for name in _ALLOCATORS:
            for owner in (torch, torch.Tensor):
                function = getattr(owner, name, None)
                if function is not None and function not in self._entries:
                    self._entries[function] = Entry(Action.ALLOCATE)

    def _add_group(self, group: str, names: list[str]) -> None:
        owner = _owner(group)
        prefix = _GROUPS[group][0] if group in _GROUPS else group
        takes = self._collector.selection.takes_api
        listed = set(names)
        for name in names:
            function = _resolve(owner, name)
            api = name.rpartition(".")[2]
            if function is None or not callable(function):
                continue
            if name in _ALLOCATORS:
                self._entries[function] = Entry(Action.ALLOCATE)
                continue
            if not takes(api, prefix):
                continue
            self._add(owner, function, name, prefix, group)
        if group == "tensor":
            for function, operators in operator_functions().items():
                self._add_operators(function, operators, listed)

    def _add(
        self, owner: Any, function: Any, name: str, prefix: str, group: str
    ) -> None:
        api = name.rpartition(".")[2]
        entry = Entry(Action.RECORD, self.site(f"{prefix}.{api}."))
        if _is_in_place(api):
            entry.positions, entry.names = _marked(api)
        if prefix == "Tensor" and api == "neg":
            entry.unary_site = self.site("Tensor.__neg__.")
        chosen = function
        if isinstance(function, FunctionType) and function.__code__ is _CHOICE:
            choice = torch._jit_internal.boolean_dispatched[function]  # noqa: SLF001
            self._add_choice(choice["if_true"], entry.site)
            chosen = choice["if_false"]
        entry.code, entry.parameters = _python_form(chosen)
        if group == "distributed" or not _is_seen_by_mode(function):
            self.unseen.append((owner, name, entry))
            return
        known = self._entries.setdefault(function, entry)
        if known.site is None:  # it is one that another function may choose
            known.site = entry.site

    def _add_choice(self, function: Any, site: CallSite | None) -> None:
        """Gives a function that another one may choose a second name."""
        entry = self._entries.get(function)
        if entry is None:
            entry = self._entries[function] = Entry(Action.RECORD)
            entry.code, entry.parameters = _python_form(function)
        entry.dispatch_site = site

    def _add_operators(
        self, function: Any, operators: tuple[str, ...], listed: set[str]
    ) -> None:
        """Gives a function that operators call a second name."""
        names = [name for name in operators if name in listed]
        takes = self._collector.selection.takes_api
        names = [name for name in names if takes(name, "Tensor")]
        entry = self._entries.get(function)
        if not names:
            return
        if entry is None or entry.action is not Action.RECORD:
            entry = self._entries[function] = Entry(Action.RECORD)
        site = self.site(f"Tensor.{names[0]}.")
        if entry.site is not site:
            entry.operator_site = site
        if any(_is_in_place(name) for name in names):
            entry.positions = (0,)

    def site(self, prefix: str) -> CallSite:
        """The site of a name; functions that share a name share its numbering."""
        return self._collector.function_site(prefix)

    def lookup(self, function: Any) -> Entry:
        """What to do with a function's calls."""
        entry = self.known.get(function)
        if entry is None:
            entry = self._entries.get(function) or self._classify(function)
            entry.is_python = _may_run_python(function)
            entry.is_quiet = _is_quiet(function)
            entry.inner = _inner(function)
            entry.settle()
            self.known[function] = entry
        return entry

    def _classify(self, function: Any) -> Entry:
        if isinstance(function, torch._ops.OpOverloadPacket | torch._ops.OpOverload):  # noqa: SLF001
            return self._classify_operator(function)
        name = getattr(function, "__name__", "")
        if _is_in_place(name):
            positions, names = _marked(name)
            return Entry(Action.WRITE, positions=positions, names=names)
        return Entry(Action.PASS)

    def _classify_operator(self, function: Any) -> Entry:
        namespace, _, name = str(function).partition(".")
        api = name.partition(".")[0]
        overloads = _overloads(function)
        if namespace in ("prim", "profiler") or not overloads:
            return Entry(Action.PASS)
        if namespace in self._namespaces:
            prefix = namespace
        else:
            prefix = namespace[:1].upper() + namespace[1:]
        if self._collector.selection.takes_api(api, prefix):
            entry = Entry(Action.RECORD, self.site(f"{prefix}.{api}."))
        else:  # not recorded, but what it writes is known
            entry = Entry(Action.WRITE)
        positions: set[int] = set()
        names: dict[str, None] = {}  # in the schema's order
        opaque: list[int | str] = []
        returns_nothing = True
        for overload in overloads:
            schema = overload._schema  # noqa: SLF001 - torch has no other access
            returns_nothing = returns_nothing and not schema.returns
            for index, argument in enumerate(schema.arguments):
                alias = argument.alias_info
                if alias is not None and alias.is_write:
                    positions.add(index)
                    names[argument.name] = None
                if _HANDLE.search(argument.name) or _CACHE.search(argument.name):
                    opaque.extend((index, argument.name))
        entry.positions, entry.names = tuple(sorted(positions)), tuple(names)
        entry.writes_unmarked = returns_nothing and not positions
        entry.is_marked = not entry.writes_unmarked
        entry.opaque = tuple(opaque)
        return entry


def _overloads(function: Any) -> list[Any]:
    if isinstance(function, torch._ops.OpOverload):  # noqa: SLF001
        return [function]
    found = [getattr(function, name) for name in function.overloads()]
    return [overload for overload in found if hasattr(overload, "_schema")]


def _may_run_python(function: Any) -> bool:
    """Whether a function may run Python code; torch's own C functions do not."""
    if isinstance(function, torch._ops.OpOverloadPacket | torch._ops.OpOverload):  # noqa: SLF001
        return any(_has_python_kernel(overload) for overload in _overloads(function))
    return not isinstance(function, _C_FUNCTIONS)


def _is_quiet(function: Any) -> bool:
    """Whether a function is one of torch's in Python that writes nothing of itself."""
    module = getattr(function, "__module__", "")
    is_torch = module in ("torch.nn.functional", "torch.functional", "torch._tensor")
    return is_torch and getattr(function, "__name__", "") in _QUIET


def _has_python_kernel(overload: Any) -> bool:
    """Whether a kernel of an operator was registered by Python code."""
    name = overload._schema.name  # noqa: SLF001 - torch has no other access
    if name.startswith(("aten::", "prim::")):
        return False
    if overload._schema.overload_name:  # noqa: SLF001
        name = f"{name}.{overload._schema.overload_name}"  # noqa: SLF001
    kernels = torch._C._dispatch_dump(name).splitlines()  # noqa: SLF001 - no other access
    return any(
        ".py:" in line or "/dev/null" in line
        for line in kernels
        if "registered at" in line and not line.startswith(("debug:", "Meta"))
    )


def _inner(function: Any) -> Callable[..., Any] | None:
    """What a method of torch.Tensor in Python does, where msProbe meets that."""
    if isinstance(function, FunctionType) and function.__code__ is _METHOD:
        inner: Callable[..., Any] = function.__wrapped__  # type: ignore[attr-defined]
        return inner if function is _ALIASED or function.__name__ in _UNNAMED else None
    return None


# Methods in Python share the code of the wrapper that asks torch.overrides.
_METHOD = torch.Tensor.__rdiv__.__code__
_ALIASED = torch.Tensor.__rdiv__
_UNNAMED = ("__rfloordiv__", "__rlshift__", "__rrshift__", "__rmatmul__")


def _marked(name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What an in-place function writes: its first argument, or several lists."""
    if name.startswith("_") and not name.startswith("__"):
        return marked_arguments(name)
    return (0,), ()


def _is_in_place(name: str) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name == "__setitem__" or (name[2:3] == "i" and name in _OPERATORS)
    return is_in_place(name)


def _python_form(function: Any) -> tuple[CodeType | None, tuple[str, ...]]:
    """Code and parameters of a function in Python that asks torch.overrides itself."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None, ()
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None, ()
    return function.__code__, tuple(p.name for p in parameters)


def _is_seen_by_mode(function: Any) -> bool:
    """Whether calls of a function reach a function mode.

    Everything implemented in C does; a Python function does if it asks torch.overrides.
    """
    layer = function
    while isinstance(layer, FunctionType):
        code = layer.__code__
        if any("torch_function" in name for name in code.co_names):
            return True
        if code.co_filename.endswith(
            "_jit_internal.py"
        ):  # boolean_dispatch asks inside
            return True
        if not hasattr(layer, "__wrapped__"):
            return False
        layer = layer.__wrapped__
    return True


# Torch has no other access to the stack of modes than to its top.
_modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack  # noqa: SLF001
_pop: Callable[[], Any] = torch.overrides._pop_mode  # noqa: SLF001
_push: Callable[[Any], None] = torch.overrides._push_mode  # noqa: SLF001


class FunctionMode(TorchFunctionMode):
    """Records the calls that the table asks for."""

    def __init__(self, collector: Collector, table: FunctionTable) -> None:
        super().__init__()
        self._collector = collector
        self._table = table
        self._callers = Callers()
        self._known = table.known

    def enter(self) -> None:
        """Sees the calls of this thread, once.

        It goes below the modes of others: when one of them ends it takes the topmost.
        That of `torch.set_default_device` alone has to be the lowest.
        """
        if self not in _modes():
            lowest = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)  # noqa: SLF001
            above = []
            while _modes() and _modes()[-1] is not lowest:
                above.append(_pop())
            for mode in (self, *reversed(above)):
                _push(mode)

    def leave(self) -> None:
        """Sees them no more; the modes of others stay on.

        In another thread than that of `enter` nothing is done: the mode stays on in the
        former and passes everything through while nothing is recorded.
        """
        above = []
        while self in _modes():
            above.append(_pop())
        for mode in reversed(above):
            if mode is not self:
                _push(mode)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Passes a call through and records it if it is to be recorded."""
        del types
        collector = self._collector
        if type(func) is MethodWrapperType:  # an attribute: one argument, read only
            if len(args) > 1 and collector.is_recording:
                collector.before_write(args[0])
            return func(*args, **(kwargs or {}))
        if not collector.is_recording:
            return func(*args, **(kwargs or {}))
        entry = self._known.get(func) or self._table.lookup(func)
        if entry.is_passed and not kwargs:
            return func(*args)
        frame = sys._getframe(1)  # noqa: SLF001 - the caller may decide the name
        if frame.f_code.co_name == "__torch_function__":
            frame = _behind_modes(frame)
        if not entry.is_simple:
            return self._call_by_caller(entry, func, args, kwargs or {}, frame)
        assert entry.site is not None
        return record_call(
            collector, entry, entry.site, func, args, kwargs or {}, frame
        )

    def _call_by_caller(
        self,
        entry: Entry,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        """A call whose name, or whose arguments, depend on who made it."""
        collector, site = self._collector, entry.site
        if entry.inner is not None and self._is_transparent(entry, frame):
            with self:
                return entry.inner(*args, **kwargs)
        if entry.dispatch_site is not None and _is_chosen(frame):
            site = entry.dispatch_site
        if entry.operator_site is not None or entry.unary_site is not None:
            site = operator_site(self._callers, self._table, entry, frame, args, site)
        if site is None:
            return call_unrecorded(collector, entry, func, args, kwargs)
        seen = args, kwargs
        if entry.code is not None:
            seen = self._as_called(entry, frame, args, kwargs)
        return record_call(collector, entry, site, func, args, kwargs, frame, seen)

    def _is_transparent(self, entry: Entry, frame: FrameType) -> bool:
        """Whether a call is seen as those that it makes.

        Python finds some operators by another name than that which is listed (`2 / a`
        calls `__rtruediv__`, an alias): msProbe meets what they do, not themselves.
        """
        if entry.site is None:
            return True
        # mode <- torch.overrides.handle_torch_function <- method <- caller
        method = frame.f_back
        if method is None or method.f_back is None:
            return False
        return self._callers.place(method.f_back).is_operator

    def _as_called(
        self,
        entry: Entry,
        frame: FrameType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments as the caller wrote them.

        A function in Python names nearly all of its arguments, and the defaults too,
        when it hands them to a mode.
        """
        # mode <- torch.overrides.handle_torch_function <- function <- caller
        function = frame.f_back
        if function is None or function.f_code is not entry.code:
            return args, kwargs
        caller = function.f_back
        assert caller is not None
        if caller.f_code is _CHOICE and caller.f_back is not None:
            caller = caller.f_back
        place = self._callers.place(caller)
        if place.positional < 0:
            return args, kwargs
        names = entry.parameters
        count = place.positional + (names[0] == "self")  # called on a tensor
        given = len(args)
        try:
            if count >= given and not place.keywords:
                return (*args, *[kwargs[name] for name in names[given:count]]), {}
            values = dict(zip(names, args, strict=False)) | kwargs
            return (
                tuple(values[name] for name in names[:count]),
                {name: values[name] for name in place.keywords},
            )
        except KeyError:
            return args, kwargs


def operator_site(
    callers: Callers,
    table: FunctionTable,
    entry: Entry,
    frame: FrameType,
    args: tuple[Any, ...],
    site: CallSite | None = None,
) -> CallSite | None:
    """The site of the operator that was written, else that of the function.

    Args:
        callers: Places that were read.
        table: Of functions.
        entry: Of the function.
        frame: Its caller.
        args: Its positional arguments, the tensor first.
        site: In place of that of the function.
    """
    site = site or entry.site
    place = callers.place(frame)
    if place.unary:
        return entry.unary_site or site
    if not place.is_operator or entry.operator_site is None:
        return site
    if (
        place.swapped
        and not isinstance(args[-1], torch.Tensor)
        and callers.is_swapped(frame, place, args)
    ):
        return table.site(f"Tensor.{place.swapped}.")
    return entry.operator_site


def _behind_modes(frame: FrameType) -> FrameType:
    """The frame that made a call which modes of others have passed on."""
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_chosen(frame: FrameType) -> bool:
    """Whether a function was called by one that chooses between two."""
    # mode <- torch.overrides.handle_torch_function <- function <- chooser
    function = frame.f_back
    chooser = function.f_back if function is not None else None
    return chooser is not None and chooser.f_code is _CHOICE


def call_unrecorded(
    collector: Collector,
    entry: Entry,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a function that is not recorded and notes what it does to memory."""
    try:
        for tensor in _written(entry, args, kwargs):
            collector.before_write(tensor)
    except Exception as error:  # noqa: BLE001 - never into the model
        collector.fail(error)
    if entry.runs_unseen(kwargs):
        return call_unseen(collector, entry, func, args, kwargs)
    result = func(*args, **kwargs)
    if entry.action is Action.ALLOCATE and isinstance(result, torch.Tensor):
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                if result.numel() and kwargs.get("out") is None:
                    collector.mark_undefined(result)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)
    return result


def call_unseen(
    collector: Collector,
    entry: Entry,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a function that may run Python code, where the mode sees nothing."""
    writes_others = not entry.is_marked
    collector.begin_unseen(writes_others=writes_others)
    try:
        return func(*args, **kwargs)
    finally:
        collector.end_unseen(writes_others=writes_others)


def record_call(
    collector: Collector,
    entry: Entry,
    site: CallSite,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: FrameType,
    seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> Any:
    """Calls a function and records inputs before and outputs after.

    Args:
        collector: Where the call is recorded.
        entry: What is known of the function.
        site: Name of the call.
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        frame: Its caller.
        seen: Arguments to record where they differ from those to call with.
    """
    given = (args, kwargs)
    record = _trace_call if collector.is_traced else _record_one
    return record(collector, entry, site, func, given, (*(seen or given), frame))


def _record_one(
    collector: Collector,
    entry: Entry,
    site: CallSite,
    func: Callable[..., Any],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    seen: tuple[tuple[Any, ...], dict[str, Any], FrameType],
) -> Any:
    """Calls a function and records it by itself."""
    args, kwargs = given
    seen_args, seen_kwargs, frame = seen
    call: RawCall | None = None
    written: list[torch.Tensor] = []
    try:
        call = collector.begin_call(site)
        selection = collector.selection
        if selection.is_trivial or selection.enter(call.name, is_module=False):
            if collector.config.extra_info:
                collector.take_stack(call, frame)
            if entry.opaque or "out" in kwargs:
                call.adjust = functools.partial(_set_roles, entry=entry)
            collector.log_inputs(call, seen_args, seen_kwargs)
        else:  # its backward may still be recorded
            selection.leave(call.name, is_module=False)
        if entry.positions or entry.names or entry.writes_unmarked or "out" in kwargs:
            written = _written(entry, args, kwargs)
            for tensor in written:
                collector.before_write(tensor)
    except Exception as error:  # noqa: BLE001 - never into the model
        collector.fail(error)
        call = None
    result = _run(collector, entry, call, func, args, kwargs)
    if call is not None and collector.is_recording:
        try:
            if call.is_taken:
                collector.log_outputs(call, result, written)
            if collector.backward is not None and torch.is_grad_enabled():
                collector.backward.watch_function(
                    call, result, args=args, written=written
                )
            if not selection.is_trivial:
                selection.leave(call.name, is_module=False)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)
    return result


def _trace_call(
    collector: Collector,
    entry: Entry,
    site: CallSite,
    func: Callable[..., Any],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    seen: tuple[tuple[Any, ...], dict[str, Any], FrameType],
) -> Any:
    """Calls a function and notes inputs before and outputs after."""
    args, kwargs = given
    point = entry.point(site)
    collector.note_start(point, *seen)
    written: list[torch.Tensor] = []
    if entry.positions or entry.names or entry.writes_unmarked or "out" in kwargs:
        try:
            written = _written(entry, args, kwargs)
            for tensor in written:
                collector.before_write(tensor)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)
    try:
        if entry.runs_unseen(kwargs):
            result = call_unseen(collector, entry, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
    except BaseException:
        collector.note_failure(point)
        raise
    collector.note_end(point, result, written)
    return result


def _run(
    collector: Collector,
    entry: Entry,
    call: RawCall | None,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a function; one that ends with an exception has a record of its inputs."""
    try:
        if entry.runs_unseen(kwargs):
            return call_unseen(collector, entry, func, args, kwargs)
        return func(*args, **kwargs)
    except BaseException:
        if call is not None:
            try:
                collector.log_failure(call)
                collector.selection.leave(call.name, is_module=False)
            except Exception as error:  # noqa: BLE001 - the model's own is on its way
                collector.fail(error)
        raise


def _set_roles(call: RawCall, *, entry: Entry) -> None:
    """Arguments that hold no numbers, and what `out=` held before, are not judged."""
    args, kwargs = call.input_args, call.input_kwargs
    if "out" in kwargs:
        kwargs["out"] = _with_role(kwargs["out"], "undefined")
    for place in entry.opaque:
        if isinstance(place, int):
            if place < len(args):
                args[place] = _with_role(args[place], "opaque")
        elif place in kwargs:
            kwargs[place] = _with_role(kwargs[place], "opaque")


def _with_role(value: Tree, role: Role) -> Tree:
    if isinstance(value, Measured):
        return with_role(value, role)
    if isinstance(value, TensorValue):
        return replace(value, role=role)
    return value


def _written(
    entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Tensors that a call wrote: marked in its schema, `out=`, or possibly all."""
    values: list[Any] = []
    if not kwargs and len(entry.positions) == 1 and not entry.writes_unmarked:
        (place,) = entry.positions
        if place < len(args) and type(args[place]) is torch.Tensor:
            return [args[place]]
    if entry.writes_unmarked:
        values.extend(args)
        values.extend(kwargs.values())
    else:
        values.extend(args[i] for i in entry.positions if i < len(args))
        values.extend(kwargs[name] for name in entry.names if name in kwargs)
    values.append(kwargs.get("out"))
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return [
        t for i, t in enumerate(found) if all(t is not other for other in found[:i])
    ]


_ENGINE = "_engine_run_backward"


class WrappedFunctions:
    """Listed functions that a mode cannot see, replaced for the time of a capture."""

    def __init__(self, collector: Collector, table: FunctionTable) -> None:
        self._collector = collector
        self._table = table
        self._replacements = Replacements()

    def install(self) -> None:
        """Replaces the functions in their modules."""
        for owner, dotted, entry in self._table.unseen:
            path, _, name = dotted.rpartition(".")
            place = _resolve(owner, path) if path else owner
            original = getattr(place, name)
            self._replacements.put(place, name, self._wrap(original, entry))
        for place in (torch.autograd, torch.autograd.graph):
            original = getattr(place, _ENGINE, None)
            if original is not None:
                self._replacements.put(place, _ENGINE, self._with_mode(original))

    def _with_mode(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Autograd's engine, running what a backward calls under the mode.

        The mode that passes on a call of `backward` is off inside it.
        """
        collector = self._collector

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            mode = collector.mode
            if mode is None or not collector.is_recording or mode in _modes():
                return original(*args, **kwargs)
            with mode:
                return original(*args, **kwargs)

        return run

    def remove(self) -> None:
        """Puts the originals back."""
        self._replacements.remove()

    def _wrap(self, original: Callable[..., Any], entry: Entry) -> Callable[..., Any]:
        collector = self._collector

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            if not collector.is_recording:
                return original(*args, **kwargs)
            frame = sys._getframe(1)  # noqa: SLF001 - stacks start at the caller
            assert entry.site is not None
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - the outermost call only
                return record_call(
                    collector, entry, entry.site, original, args, kwargs, frame
                )

        return function
