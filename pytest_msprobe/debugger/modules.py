# SPDX-License-Identifier: Apache-2.0
"""Level L0: the `forward` of every submodule's instance is wrapped for a capture.

A wrapper on the instance keeps `nn.Module.__call__` on its fast path and is also met
by classes whose `__call__` goes around it (vLLM's support_torch_compile).
"""

import contextlib
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from types import MethodType
from typing import Any

import torch

from pytest_msprobe.debugger.backward import Backward, ModulePass
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.load import Loader
from pytest_msprobe.debugger.raw import Numbering, RawCall
from pytest_msprobe.debugger.trace import marks_of
from pytest_msprobe.errors import ConfigError

_MISSING = object()
_MANY = 3


def root_models(
    model: torch.nn.Module | Sequence[torch.nn.Module],
) -> list[tuple[str, torch.nn.Module]]:
    """The models given to `start` with the prefix of their submodules' paths.

    Raises:
        ConfigError: It is neither a module nor a list or tuple of modules.
    """
    if isinstance(model, list | tuple):
        roots = [(f"{index}.", item) for index, item in enumerate(model)]
    else:
        roots = [("", model)]
    for _, root in roots:
        expected = "expected a module, or a list or tuple of modules"
        if isinstance(root, torch.jit.ScriptModule):
            expected += " that are not in TorchScript, which no wrapper sees"
        elif isinstance(root, torch.nn.Module):
            continue
        message = f"model: {expected}, found {type(root).__name__}"
        raise ConfigError(message, slug="model")
    return roots


def module_paths(
    roots: Sequence[tuple[str, torch.nn.Module]],
) -> dict[int, tuple[torch.nn.Module, list[str]]]:
    """Every submodule, by id, with all the paths that lead to it.

    Roots are left out, and modules in TorchScript.
    """
    found: dict[int, tuple[torch.nn.Module, list[str]]] = {}
    for prefix, root in roots:
        for path, module in root.named_modules(remove_duplicate=False):
            if path and not isinstance(module, torch.jit.ScriptModule):
                entry = found.setdefault(id(module), (module, []))
                entry[1].append(prefix + path)
    return found


class ModuleWrappers:
    """Puts wrappers on the submodules of a model and takes them off again.

    Attributes:
        roots: The models, each with the prefix of its submodules' paths.
        recorded: Ids of the modules that have a record here.
    """

    def __init__(
        self, collector: Collector, model: torch.nn.Module | Sequence[torch.nn.Module]
    ) -> None:
        self._collector = collector
        self.roots = root_models(model)
        self._originals: list[tuple[torch.nn.Module, object, object]] = []
        self.recorded: set[int] = set()
        self._is_installed = False

    def install(
        self, *, has_modules: bool, others: Collection["ModuleWrappers"] = ()
    ) -> None:
        """Wraps every submodule and notes where the model's forward begins.

        Called again, it wraps what has joined the model since.

        Args:
            has_modules: Whether calls of modules are recorded; else only the place
                where the forward begins is noted.
            others: Wrappers of other models; what they have is not wrapped again.
        """
        known: set[int] = self.recorded.union(*(other.recorded for other in others))
        marked = {id(root) for other in others for _, root in other.roots}
        sizes: Counter[int] = Counter()
        for module, paths in module_paths(self.roots).values():
            for parameter in module.parameters(recurse=False):
                sizes.update(set(parameter.shape))
            if has_modules and id(module) not in known:
                self.recorded.add(id(module))
                self._wrap(module, self._record(module, paths))
                if self._collector.backward is not None:
                    prefix = f"Module.{paths[0]}.{type(module).__name__}"
                    self._collector.backward.watch_parameters(module, prefix)
        for index, (_, root) in enumerate(self.roots):
            if id(root) not in marked and not self._is_installed:
                self._wrap(root, self._mark_forward(root, is_counted=index == 0))
        self._is_installed = True
        self._collector.model_dimensions |= set(sizes)
        # A size that few parameters have is that of the vocabulary: few rows have it.
        widths = [size for size, count in sizes.items() if count >= _MANY] or [*sizes]
        self._collector.width = max([self._collector.width, *widths])

    def install_one(self, name: str) -> None:
        """Wraps the model itself under a name, and nothing inside it."""
        ((_, model),) = self.roots
        self._wrap(model, self._record(model, [name]))

    def has(self, module: torch.nn.Module) -> bool:
        """Whether a module is recorded."""
        return id(module) in self.recorded

    def remove(self) -> None:
        """Restores every module as it was; what others have put there since stays."""
        for module, original, wrapper in reversed(self._originals):
            if module.__dict__.get("forward") is not wrapper:
                continue
            if original is _MISSING:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
        self._originals.clear()

    def _wrap(self, module: torch.nn.Module, wrapper: Callable[..., Any]) -> None:
        before = module.__dict__.get("forward", _MISSING)
        self._originals.append((module, before, wrapper))
        module.__dict__["forward"] = wrapper

    def _mark_forward(
        self, root: torch.nn.Module, *, is_counted: bool
    ) -> Callable[..., Any]:
        collector, original = self._collector, root.forward
        plain = _plain(root)

        @functools.wraps(plain)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is not root:
                return plain(self, *args, **kwargs)
            if is_counted and collector.forward_range is not None:
                collector.count_forward()
            if not collector.is_recording:
                return original(*args, **kwargs)
            thread = collector.enter_thread()
            try:
                collector.enter_forward(_input_rows(args, kwargs))
            except Exception as error:  # noqa: BLE001 - never into the model
                collector.fail(error)
            try:
                return original(*args, **kwargs)
            finally:
                collector.set_phase("after")
                collector.leave_thread(thread)

        return MethodType(forward, root)

    def _record(self, module: torch.nn.Module, paths: list[str]) -> Callable[..., Any]:
        hook = _ModuleHook(self._collector, module, paths)
        recorded = self._observe(module, hook)
        if self._collector.loader is None:
            return recorded
        return _with_loaded(hook, module, recorded, self._collector.loader)

    def _observe(
        self, module: torch.nn.Module, hook: "_ModuleHook"
    ) -> Callable[..., Any]:
        original = module.forward
        if self._collector.backward is not None:
            return _with_gradients(hook, module, self._collector.backward)
        plain = _plain(module)

        collector = self._collector

        @functools.wraps(plain)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is not module:
                return plain(self, *args, **kwargs)
            if not collector.is_recording:
                return original(*args, **kwargs)
            if not collector.is_traced:
                return one_by_one(*args, **kwargs)
            collector.note_start(hook, args, kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                collector.note_failure(hook)
                raise
            if result is None:
                collector.note_silent_end(hook, args, kwargs)
            else:
                collector.note_end(hook, result)
            return result

        def one_by_one(*args: Any, **kwargs: Any) -> Any:
            entered = hook.enter(args, kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                hook.abort(entered)
                raise
            hook.leave(entered, result)
            return result

        return MethodType(forward, module)


def _plain(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward of a module as a function of the module.

    A wrapper is bound to its module as the forward of its class is, so that a copy of
    the module (`copy.deepcopy`, pickle) has a forward of the copy.
    """
    forward = module.forward
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return forward.__func__

    @functools.wraps(forward)
    def plain(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        del self
        return forward(*args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(forward)
        names = [own, *signature.parameters.values()]
        plain.__signature__ = signature.replace(parameters=names)  # type: ignore[attr-defined]
    return plain


def _with_loaded(
    hook: "_ModuleHook",
    module: torch.nn.Module,
    recorded: Callable[..., Any],
    loader: Loader,
) -> Callable[..., Any]:
    """The wrapper of a module whose inputs may be replaced."""
    plain = _plain(module)

    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return plain(self, *args, **kwargs)
        if hook.collector.is_recording:
            try:
                with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                    args, kwargs = loader.replace(hook.next_name(), args, kwargs)
            except Exception as error:  # noqa: BLE001 - never into the model
                hook.collector.fail(error)
        return recorded(*args, **kwargs)

    return MethodType(forward, module)


def _with_gradients(
    hook: "_ModuleHook", module: torch.nn.Module, backward: Backward
) -> Callable[..., Any]:
    """The wrapper of a module whose gradients are recorded too."""
    original, plain = module.forward, _plain(module)

    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return plain(self, *args, **kwargs)
        if not hook.collector.is_recording:
            return original(*args, **kwargs)
        entered = hook.enter(args, kwargs)
        passed = hook.isolate(backward, entered, args)
        inner = args if passed is None else passed.args
        try:
            result = original(*inner, **kwargs)
        except BaseException:
            hook.abort(entered)
            if passed is not None:
                passed.cancel()
            raise
        hook.leave(entered, result)
        if passed is not None:
            hook.watch(passed, result)
        return result

    return MethodType(forward, module)


class _ModuleHook:
    """What is done around each call of one module; nothing raises."""

    def __init__(
        self, collector: Collector, module: torch.nn.Module, paths: list[str]
    ) -> None:
        name = type(module).__name__
        self.collector = collector
        self.module = module
        self.site = collector.module_site(f"Module.{paths[0]}.{name}.forward.")
        self.marks = marks_of(self)
        self.site.places = collector.places.get(paths[0], {})
        self._aliases = {}
        if len(paths) > 1:
            self._aliases = {
                path.rpartition(".")[0]: f"Module.{path}.{name}.forward."
                for path in paths
            }
        config = collector.config
        self._keeps_stacks = config.extra_info
        self._is_selective = not collector.selection.is_trivial

    def next_name(self) -> str:
        """Name that the next call will have."""
        return self.site.name(self.collector.numbering.next_number(self.site))

    def start(self, numbering: Numbering) -> RawCall:
        """A numbered record of a call."""
        alias = ""
        if self._aliases:
            alias = self._aliases.get(numbering.path, "")
        return numbering.begin(self.site, alias)

    def adjust(self, call: RawCall) -> None:
        """Modules know no roles."""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RawCall | None:
        """Notes a call with its inputs."""
        collector = self.collector
        try:
            call = self.start(collector.numbering)
            if collector.progress is not None:
                collector.progress.note(call.name)
            if self._is_selective and not collector.selection.enter(
                call.name, is_module=True
            ):
                return call
            if self._keeps_stacks:
                collector.take_stack(call, sys._getframe(1))  # noqa: SLF001
            call.module = self.module
            collector.log_inputs(call, args, kwargs)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)
            return None
        return call

    def leave(self, call: RawCall | None, result: Any) -> None:
        """Notes its outputs."""
        if call is None:
            return
        collector = self.collector
        collector.numbering.leave(call)
        try:
            if not collector.is_recording:
                collector.log_failure(call)
            elif call.is_taken:
                collector.log_outputs(call, result)
            if self._is_selective:
                collector.selection.leave(call.name, is_module=True)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)

    def isolate(
        self, backward: Backward, call: RawCall | None, args: tuple[Any, ...]
    ) -> ModulePass | None:
        """Prepares a call for its backward; None where there will be none."""
        if call is None or not torch.is_grad_enabled():
            return None
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                return ModulePass(backward, call, args)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)
            return None

    def watch(self, passed: ModulePass, result: Any) -> None:
        """Has the gradients of a call recorded."""
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                passed.watch(result)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)

    def abort(self, call: RawCall | None) -> None:
        """The call ended with an exception."""
        if call is None:
            return
        try:
            self.collector.numbering.leave(call)
            self.collector.log_failure(call)
            self.collector.selection.leave(call.name, is_module=True)
        except Exception as error:  # noqa: BLE001 - the model's own is on its way
            self.collector.fail(error)


def _input_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of a vLLM model's inputs, padding included."""
    for name, dimension in (("input_ids", 0), ("inputs_embeds", 0), ("positions", -1)):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[dimension])
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim:
        return int(args[0].shape[0])
    return None
